"""Bringing a rewritten program back to what the original computes."""
