"""Convolutions in 8 bits, as products of what their windows see."""
