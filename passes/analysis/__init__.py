"""Passes that compute and change nothing."""
