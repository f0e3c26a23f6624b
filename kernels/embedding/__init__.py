"""Rows of a stored table, dequantised as they are looked up."""
