"""Whether a program rounds activations to integers."""

from __future__ import annotations

import torch
from torch import fx

from torchlathe.ir import Program

__all__ = ["gives_integers", "rounds"]

aten = torch.ops.aten

_ROUNDS = frozenset({aten.round.default, aten.round.decimals})
_INTEGERS = (torch.int8, torch.uint8)


def rounds(program: Program) -> bool:
    """Whether the program rounds activations to integers."""
    return any(
        node.op == "call_function"
        and (
            node.target in _ROUNDS
            or str(node.target).startswith("torchlathe")
            or gives_integers(node)
        )
        and any("val" in used.meta for used in node.all_input_nodes)
        for node in program.nodes
    )


def gives_integers(node: fx.Node) -> bool:
    """Whether floating values go into a node, and integers of few bits come out."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, torch.Tensor) and v.dtype in _INTEGERS for v in values) and any(
        isinstance(a := used.meta.get("val"), torch.Tensor) and a.is_floating_point()
        for used in node.all_input_nodes
    )
