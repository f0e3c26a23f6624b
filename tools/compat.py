"""What third-party packages need before torchlathe's tools and tests can import them."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch

__all__ = ["define_torchvision_ops"]

# The operators that torchvision's Python code names while it is being imported.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def define_torchvision_ops() -> tuple[str, ...]:
    """Define the operator schemas that an incomplete torchvision lacks.

    A torchvision built for another torch (say, one for CUDA beside a CPU build) cannot load its
    own operators, and then fails while it is imported, although its Python models work. So does
    all that imports it, transformers and timm among them: call this before importing any of these.
    It does nothing where torchvision is absent, complete or already imported.

    Returns:
        The names of the operators that this call defined.
    """
    if "torchvision" in sys.modules or _loads_own_operators():
        return ()
    missing = tuple(s for s in _TORCHVISION_SCHEMAS if not _is_defined(s.partition("(")[0]))
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _keep_alive.append(library)
    return tuple(schema.partition("(")[0] for schema in missing)


_keep_alive: list[torch.library.Library] = []  # a library that is collected takes its schemas along


def _loads_own_operators() -> bool:
    """Whether torchvision is absent, or its operators load; loading twice is harmless."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    folder = Path(spec.submodule_search_locations[0])
    for path in sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]):
        try:
            torch.ops.load_library(str(path))
        except (ImportError, OSError):
            continue
        if _is_defined("nms"):
            return True
    return False


def _is_defined(name: str) -> bool:
    return hasattr(torch.ops.torchvision, name)
