"""Benchmarks: each prints what it measured as JSON and takes ``--help``."""
