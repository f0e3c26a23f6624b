"""Embeddings in the logical form: one op looks rows up and dequantises them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.rewrite.lowering.forms import Maker
from torchlathe.passes.rewrite.lowering.layers import logical_nodes

__all__ = ["Table", "tables"]

aten = torch.ops.aten
ops = torch.ops.torchlathe


@dataclass(frozen=True, eq=False)
class Table:
    """One look-up of stored rows.

    Attributes:
        call: The node that dequantises what was looked up.
        parts: Placeholders of values, scales and zero points.
        indices: What is looked up.
    """

    call: fx.Node
    parts: tuple[fx.Node, fx.Node, fx.Node | None]
    indices: fx.Node
    op = "quantised_embedding"

    @property
    def name(self) -> str:
        """Of the stored numbers."""
        return str(info(self.parts[0]).tensor)

    def write(self, maker: Maker) -> None:
        """Put the op in its place; it passes no gradient to the scales."""
        program, scales = maker.edit.program, str(info(self.parts[1]).tensor)
        entry = program.entries[scales]
        if entry.tensor.requires_grad:
            frozen = torch.nn.Parameter(entry.tensor.detach(), requires_grad=False)
            program.entries[scales] = replace(entry, tensor=frozen)
        total, columns, group, form, dtype = (
            argument(self.call, part) for part in ("total", "columns", "group", "format", "dtype")
        )
        args = (maker.now(self.indices), *self.parts, total, columns, group, form, dtype)
        target = ops.quantised_embedding.default
        maker.stands(self.call, maker.edit.call(target, args, like=self.call, before=self.call))


def tables(program: Program) -> Iterator[Table]:
    """Every look-up of stored rows, in order of execution."""
    for node in logical_nodes(program):
        found = [_looked_up(argument(node, part)) for part in ("values", "scales", "zeros")]
        values, scales, zeros = found
        if values is None or scales is None or (zeros is None) != (argument(node, "zeros") is None):
            continue
        indices = {pair[1] for pair in found if pair is not None}
        if len(indices) == 1:
            parts = (values[0], scales[0], None if zeros is None else zeros[0])
            yield Table(node, parts, indices.pop())


def _looked_up(value: Any) -> tuple[fx.Node, fx.Node] | None:
    """The table and the indices of a look-up."""
    if not isinstance(value, fx.Node) or value.target is not aten.embedding.default:
        return None
    table, indices = value.args[0], value.args[1]
    if not isinstance(table, fx.Node) or not isinstance(indices, fx.Node):
        return None
    return None if info(table).tensor is None else (table, indices)
