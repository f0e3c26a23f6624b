"""Where a scale for each channel can move from what is read to what writes it, exactly.

A value that only products read may be divided by ``s`` channel by channel, if its writers can be
divided instead and the columns of what reads it are multiplied. Writers are norms with a weight of
their own, linear layers, and these through ops that pass a positive scale on: products with another
value, relu, casts, and the reshapes of attention, where the axis terms say that the channels of the
value and of the result are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from torchlathe.ir import Edit, Program, TensorKind
from torchlathe.ir.axes import AxisTerms
from torchlathe.ir.axes.inference import AxisMap
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.rewrite.factorising.sites import Site

__all__ = ["Fold", "apply", "find_folds"]

aten = torch.ops.aten
_PASSES = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.relu.default,
)
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True, eq=False)
class Fold:
    """A value whose channels can be scaled.

    Attributes:
        value: What the layers read, channels last.
        sites: The layers; all readers of the value.
        writers: Tensors to divide, with the axis of the channels.
    """

    value: fx.Node
    sites: tuple[Site, ...]
    writers: tuple[tuple[str, int], ...] = field(default=())

    @property
    def channels(self) -> int:
        """Extent of the scaled axis."""
        return self.sites[0].ins


def find_folds(program: Program, sites: Iterable[Site], *, insert: bool = False) -> list[Fold]:
    """Every value that is read by these layers alone and can be scaled, in order of execution.

    Args:
        program: The program.
        sites: The layers.
        insert: Whether other values count as well: with no writers, a product is put before the
            layers.
    """
    by_call = {
        call: site
        for site in sites
        if site.kind == "linear" and len(site.calls) == 1
        for call in site.calls
    }
    axis_map = program.analysis(AxisTerms)
    read: dict[fx.Node, list[Site]] = {}
    for call, site in by_call.items():
        read.setdefault(site.operand(call), []).append(site)
    found = []
    for value, readers in read.items():
        plain = all(
            user in by_call and by_call[user].operand(user) is value for user in value.users
        )
        floating = value.meta["val"].is_floating_point()
        writers = _Walk(program, axis_map, value).writers(value) if plain else None
        if writers is not None or (insert and floating):
            found.append(Fold(value, tuple(readers), tuple(writers or ())))
    return found


class _Walk:
    """The search for what writes a value."""

    def __init__(self, program: Program, axis_map: AxisMap, value: fx.Node) -> None:
        self.program, self.axis_map = program, axis_map
        self.extent = value.meta["val"].shape[-1]
        self.channels = self._channels(value)

    def writers(self, node: fx.Node) -> list[tuple[str, int]] | None:
        """Tensors to divide so that a node is divided, or None."""
        target: Any = node.target
        if node.op != "call_function" or self.channels is None:
            return None
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            shape: Any = argument(node, "normalized_shape")
            names = ("weight", "bias") if target is aten.layer_norm.default else ("weight",)
            if len(shape) != 1 or argument(node, "weight") is None or not self._same(node):
                return None
            return self._own(node, {name: 0 for name in names})
        if target is aten.linear.default:
            return self._own(node, {"weight": 0, "bias": 0}) if self._same(node) else None
        if target is aten.addmm.default:
            plain = not node.kwargs and self._same(node)
            bias: Any = node.args[0]
            plain = plain and bias.meta["val"].dim() == 1
            return self._own(node, {"self": 0, "mat2": 1}) if plain else None
        if target is aten.mul.Tensor:
            return self._product(node)
        if target in _PASSES or target in _RESHAPES:
            return self._through(node, node.args[0])
        if target is aten.scaled_dot_product_attention.default:
            return self._through(node, node.args[2])
        return None

    def _channels(self, node: fx.Node) -> list[int] | None:
        """The atoms of the last axis in their order; None if another axis has one of them, too."""
        (row,) = self.axis_map.results(node)[:1]
        if not row:
            return None
        *others, last = ([a.number for a in self.axis_map.atoms_of(term)] for term in row)
        return None if any(set(last) & set(other) for other in others) else last

    def _same(self, node: fx.Node) -> bool:
        """Whether the last axis of a node has the channels of the value, in their order."""
        value: Any = node.meta["val"]
        return bool(value.shape[-1] == self.extent) and self._channels(node) == self.channels

    def _through(self, node: fx.Node, source: Any) -> list[tuple[str, int]] | None:
        if not isinstance(source, fx.Node) or not _only_once(source, node):
            return None
        return self.writers(source)

    def _product(self, node: fx.Node) -> list[tuple[str, int]] | None:
        """A vector of the model that is multiplied, else one of the two factors."""
        same = self._same(node)
        for factor in node.args:
            if same and isinstance(factor, fx.Node) and self._vector(factor, node):
                name = info(factor).tensor
                assert name is not None
                return [(name, 0)]
        # The factor without an activation comes last in gated layers.
        for factor in reversed(node.args):
            found = self._through(node, factor)
            if found is not None:
                return found
        return None

    def _vector(self, node: fx.Node, user: fx.Node) -> bool:
        value: Any = node.meta.get("val")
        return (
            self._parameter(node, user) is not None
            and value.dim() == 1
            and value.shape[0] == self.extent
        )

    def _parameter(self, node: Any, user: fx.Node) -> str | None:
        """The name of a parameter that only this node reads."""
        name = info(node).tensor if isinstance(node, fx.Node) else None
        if name is None or self.program.entries[name].kind is not TensorKind.PARAMETER:
            return None
        floating = self.program.tensor(name).is_floating_point()
        return name if floating and _only_once(node, user) else None

    def _own(self, node: fx.Node, axes: Mapping[str, int]) -> list[tuple[str, int]] | None:
        found = []
        for argument_name, axis in axes.items():
            operand = argument(node, argument_name)
            if operand is None:
                continue
            name = self._parameter(operand, node)
            if name is None or self.program.tensor(name).shape[axis] != self.extent:
                return None
            found.append((name, axis))
        return found


def _only_once(node: fx.Node, user: fx.Node) -> bool:
    """Whether one op alone reads a node, and does so in one place."""
    places = [*user.args, *user.kwargs.values()]
    return set(node.users) == {user} and sum(used is node for used in places) == 1


def apply(
    edit: Edit, folds: Sequence[tuple[Fold, Tensor]], report: Callable[[str], object]
) -> None:
    """Divide what writes each value by its scales, and multiply the columns that read it.

    Args:
        edit: The edit.
        folds: Values with their scales, (channels,), all above zero.
        report: Called with a line of text.
    """
    program = edit.program
    for number, (fold, scales) in enumerate(folds):
        report(f"moving scales of {fold.sites[0].weight} ({number + 1}/{len(folds)})")
        if not fold.writers:
            _insert(edit, fold, scales)
        for name, axis in fold.writers:
            tensor = program.tensor(name).detach()
            shape = [1] * tensor.dim()
            shape[axis] = -1
            edit.set_tensor(name, (tensor.double() / scales.double().view(shape)).to(tensor.dtype))
        for site in fold.sites:
            tensor = program.tensor(site.weight).detach()
            shape = [-1, 1] if site.transposed else [1, -1]
            new = (tensor.double() * scales.double().view(shape)).to(tensor.dtype)
            edit.set_tensor(site.weight, new)


def _insert(edit: Edit, fold: Fold, scales: Tensor) -> None:
    """Multiply the value before its layers; what else reads it reads it as it was."""
    name = f"{fold.sites[0].weight}_input_scale"
    dtype = fold.value.meta["val"].dtype
    vector = edit.add_tensor(name, (1 / scales.double()).to(dtype))
    calls = [call for site in fold.sites for call in site.calls]
    first = min(calls, key=list(edit.program.graph.nodes).index)
    scaled = edit.call(aten.mul.Tensor, (fold.value, vector), like=first, before=first)
    edit.replace(fold.value, scaled, calls)
