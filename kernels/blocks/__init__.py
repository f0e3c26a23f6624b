"""Pieces that several kernels share; only ``triton.py`` holds code, and it is imported late."""
