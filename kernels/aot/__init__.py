"""Compiling kernels ahead of time for a GPU that need not be there, and reading the result.

Nothing here imports torch: the checks run in an environment that holds Triton alone.
"""
