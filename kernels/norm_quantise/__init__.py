"""Norms whose result is quantised at once, token by token."""
