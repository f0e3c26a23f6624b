"""Zeros in patterns: N of M, blocks, or anywhere."""
