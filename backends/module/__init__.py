"""The module backend: a smaller copy of the model's own classes, checked against the graph."""

from torchlathe.backends.module.backend import ModuleBackend, ModuleRun

__all__ = ["ModuleBackend", "ModuleRun"]
