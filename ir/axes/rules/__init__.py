"""Axis rules, one file for each family of ops."""
