"""Passes that change the program."""
