"""The inputs that a backend tries a program on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import Program

__all__ = ["flat_examples", "grown_inputs"]


def flat_examples(program: Program) -> list[Any]:
    """The flat example inputs, where the program is now: ``.to(...)`` moves it, and not them."""
    args, kwargs = program.example_inputs
    flat = pytree.tree_leaves((tuple(args), dict(kwargs)))
    found = []
    for node, value in zip(program.input_nodes, flat, strict=True):
        fake = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
            value = value.detach().to(fake.device, fake.dtype)
        found.append(value)
    return found


def grown_inputs(program: Program) -> list[Any] | None:
    """The flat example inputs, larger by one in every dynamic dimension; None if there is none.

    A dimension that is at its limit stays, and so do those that the model derives from others.
    """
    flat = flat_examples(program)
    grown, changed = [], False
    for node, value in zip(program.input_nodes, flat, strict=True):
        fake = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(fake, torch.Tensor):
            for axis, extent in enumerate(fake.shape):
                if isinstance(extent, int) or not extent.node.expr.is_symbol:
                    continue
                size = value.shape[axis]
                limit = program.range_constraints.get(extent.node.expr)
                if size and (limit is None or bool(limit.upper >= size + 1)):
                    index = torch.arange(size + 1, device=value.device) % size
                    value, changed = value.index_select(axis, index), True
        grown.append(value)
    return grown if changed else None
