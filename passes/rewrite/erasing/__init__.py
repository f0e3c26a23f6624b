"""Structured erase: which units may go, cutting them out, and what keeps the outputs."""
