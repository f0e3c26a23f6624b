"""Names of tensors in files, where transformers has other ones in its modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["as_in_files", "file_names", "file_paths"]


def as_in_files(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the parts, that files of the architecture have.

    Some architectures have had other names for their modules, or a tensor for each expert where
    the module has one for all; transformers converts these whenever it loads or saves.
    """
    # A model of transformers is at hand, so that its package is loaded; older ones convert nothing.
    loading: Any = sys.modules.get("transformers.core_model_loading")
    revert = getattr(loading, "revert_weight_conversion", None)
    reverted: dict[str, Tensor] = tensors if revert is None else revert(model, tensors)
    return reverted


def file_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The name in files of each tensor of a model; of what files have in parts, its own."""
    wanted = list(names)
    if _renamed(model, wanted) == sorted(wanted):  # as most models have it
        return {name: name for name in wanted}
    found = {}
    for name in wanted:
        renamed = _renamed(model, [name])
        found[name] = renamed[0] if len(renamed) == 1 else name
    return found


def _renamed(model: nn.Module, names: list[str]) -> list[str]:
    try:
        return sorted(as_in_files(model, {n: torch.empty(1, 1, device="meta") for n in names}))
    except (RuntimeError, ValueError, IndexError):
        return []  # parts of a tensor of another shape


def file_paths(model: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The path in files of each layer of a model."""
    weights = file_names(model, (f"{path}.weight" for path in paths))
    return {a.removesuffix(".weight"): b.removesuffix(".weight") for a, b in weights.items()}
