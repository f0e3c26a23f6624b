"""Erasing whole branches of operators."""
