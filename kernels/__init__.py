"""Fused kernels: one folder per op with its reference, Triton kernel and registration."""

# Run from the repository root, `kernels` is importable as a top-level name, and transformers
# probes for a package of that name whenever it is imported. Raising ImportError here, as the
# other folders do, would break `import transformers`; version 0 says "not that package", and
# without a path nothing below it can be imported a second time under that name.
if __name__ != "torchlathe.kernels":
    __version__ = "0"
    __path__ = []
