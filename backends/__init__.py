"""Backends: what runs a program, and the file that a compiled model is kept in."""

if __name__ != "torchlathe.backends":
    raise ImportError("import torchlathe.backends, not backends")

from torchlathe.backends.agreeing import Agreement, DisagreementError
from torchlathe.backends.artifact import load, manifest, save
from torchlathe.backends.base import (
    Backend,
    Capabilities,
    Configured,
    Lowerable,
    backend_names,
    backend_text,
    capabilities_of,
    get_backend,
)
from torchlathe.backends.compiled import CompiledModel
from torchlathe.backends.eager import Eager
from torchlathe.backends.graph_json import SavedReport
from torchlathe.backends.inductor import Inductor

__all__ = [
    "Agreement",
    "Backend",
    "Capabilities",
    "CompiledModel",
    "Configured",
    "DisagreementError",
    "Eager",
    "Inductor",
    "Lowerable",
    "SavedReport",
    "backend_names",
    "backend_text",
    "capabilities_of",
    "get_backend",
    "load",
    "manifest",
    "save",
]
