"""Tuning, timing and judging the fused kernels on a GPU."""
