"""Fewer experts behind a router: the numbers that it gives are looked up in a table.

The table maps what was an expert to what is one now. It stands right behind the choice, so that
sorting and counting follow it, and two picks of a row that meet in one expert both count: their
gates add up, as they should.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, Program
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.experts import ExpertLayer

__all__ = ["free_name", "relabel", "resize_counts"]

aten = torch.ops.aten


def relabel(edit: Edit, layer: ExpertLayer, numbers: torch.Tensor) -> None:
    """Let the reads of a layer go by other numbers of experts.

    Args:
        edit: Of the layer's program; its tensors are for the caller to replace.
        layer: As found before the edit.
        numbers: Per expert, which of the new experts takes its place; shape (experts,) int64.
    """
    program = edit.program
    if layer.table is not None:
        old = program.tensor(layer.table)
        edit.set_tensor(layer.table, numbers.to(old.device)[old.long()].to(old.dtype))
    else:
        readers = [user for user in layer.assigned.users if user in layer.path]
        readers += [r.node for r in layer.reads if r.by is layer.assigned]
        value = layer.assigned.meta["val"]
        name = free_name(program, layer, "expert_of_choice")
        table = edit.add_tensor(name, numbers.to(value.device, value.dtype))
        found = edit.call(aten.index.Tensor, (table, [layer.assigned]), like=layer.assigned)
        edit.replace(layer.assigned, found, users=list(dict.fromkeys(readers)))
    resize_counts(edit, layer, int(numbers.max()) + 1)


def resize_counts(edit: Edit, layer: ExpertLayer, experts: int) -> None:
    """Count so many experts from now on."""
    for node in layer.counting:
        name = op_name(node)
        if name == "histc":
            _set(edit, node, {"bins": (1, experts), "min": (2, 0), "max": (3, experts - 1)})
        elif name == "bincount":
            _set(edit, node, {"minlength": (2, experts)})
        else:
            _set(edit, node, {"num_classes": (1, experts)})


def _set(edit: Edit, node: fx.Node, wanted: Mapping[str, tuple[int, Any]]) -> None:
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, (place, value) in wanted.items():
        if place < len(args):
            args[place] = value
        elif name in kwargs or value:
            kwargs[name] = value
    edit.set_args(node, tuple(args), kwargs)


def free_name(program: Program, layer: ExpertLayer, leaf: str) -> str:
    """A name for a tensor of a layer that none has yet: in its module, with a number if needed."""
    # A layer without a module of its own is called after a tensor, and no name goes below that.
    module = layer.name.rpartition(".")[0] if layer.name in layer.tensors else layer.name
    wanted = f"{module}.{leaf}" if module else leaf
    taken = {*program.entries, *program.aliases, *program.carried}
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name
