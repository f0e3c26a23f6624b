"""Kernels for what earlier passes brought into a logical form."""
