"""Moving the constant that erased units hold into the bias of what reads them.

A sigmoid of a zeroed channel is one half everywhere, so the linear layer behind it adds the same
vector at every position: ``b' = b + W[:, erased] @ c`` (algebra; exact where no padding mixes
other values in, which the axis rules decide).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind, info
from torchlathe.ir.axes import AxisMap, Resize, rule_of
from torchlathe.ir.axes.rule import Layout, argument, with_arguments
from torchlathe.ir.axes.rules.contraction import Contraction
from torchlathe.ir.fakes import valueless
from torchlathe.ir.interpreting import ReplaceTensor
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.rewrite.erasing.units import unit_indices

__all__ = ["fold_into_bias", "folded_constants"]


def folded_constants(
    program: Program,
    chosen: Sequence[Family],
    kept: Mapping[int, torch.Tensor],
    axis_map: AxisMap,
    zeroing: ReplaceTensor,
) -> dict[fx.Node, torch.Tensor]:
    """What the erased units of the families add to each reader, before anything is erased.

    Returns:
        Per node, float64 of shape (out,), over the output channels as they are now.
    """
    found: dict[fx.Node, torch.Tensor] = {}
    for node in {node: None for family in chosen for node in family.folds}:
        layout = axis_map.layouts[node]
        weight_node = layout.factors[1][0]
        axis = Contraction.read_axis(layout)
        term = axis_map.terms(weight_node)[axis]
        constants = torch.zeros(term.extent, dtype=torch.float64)
        for family in chosen:
            if node in family.folds:
                owner = unit_indices(term, family.atom.number)
                gone = (owner >= 0) & ~kept[family.atom.number][owner.clamp_min(0)]
                constants[gone] = family.folds[node]
        rule = rule_of(node)
        name = info(weight_node).tensor
        assert isinstance(rule, Contraction)
        assert name is not None
        if valueless(program.entries[name].tensor):
            channels = axis_map.terms(node)[_channel_axis(layout)].extent
            found[node] = torch.zeros(channels, dtype=torch.float64)
            continue
        # Where another family's units are zero for their readers, they take no constant.
        weight = zeroing(name, program.entries[name].tensor)
        found[node] = rule.folded(node, layout, weight, constants)
    return found


def fold_into_bias(node: fx.Node, delta: torch.Tensor, resize: Resize) -> None:
    """Add to a contraction's bias; one that others read too, or that is missing, is made new."""
    rule = rule_of(node)
    assert isinstance(rule, Contraction)
    argument_name = rule.bias(node)
    assert argument_name is not None
    stays = resize.mask(resize.terms(node)[_channel_axis(resize.layout(node))])
    if stays is not None:
        delta = delta[stays]
    edit = resize.edit
    entries = edit.program.entries
    bias = argument(node, argument_name)
    weight = info(resize.layout(node).factors[1][0]).tensor
    assert weight is not None
    like = entries[weight].tensor
    name = info(bias).tensor if isinstance(bias, fx.Node) else None
    if isinstance(bias, fx.Node) and name is not None and len(bias.users) == 1:
        old = entries[name].tensor
        edit.set_tensor(name, _sum(delta, old, old), rewrites=False)
        return
    value = _sum(delta, None, like)
    new_name = _free_name(edit.program, weight)
    new = edit.add_tensor(new_name, value, TensorKind.PARAMETER)
    # What it adds is zero with the weight's rows, and the original has no such tensor to zero.
    edit.record_zeroed(new_name, 0, torch.zeros(0, dtype=torch.int64))
    if isinstance(bias, fx.Node):
        # A bias that is computed, or that others read, keeps its part of the sum: later passes
        # zero it by its own name, for all who read it.
        new = edit.call(torch.ops.aten.add.Tensor, (bias, new), like=bias, before=node)
    edit.set_args(node, *with_arguments(node, {argument_name: new}))


def _sum(delta: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The new bias, on the device and in the dtype of another tensor."""
    if valueless(like):
        return like.detach().new_empty(len(delta))
    value = delta.to(like.device)
    if bias is not None:
        value = value + bias.detach().to(torch.float64)
    return value.to(like.dtype)


def _channel_axis(layout: Layout) -> int:
    """The result's axis that the bias belongs to."""
    own = {letter for axis in layout.factors[1][1] for letter in axis}
    data = {letter for axis in layout.factors[0][1] for letter in axis}
    return next(i for i, axis in enumerate(layout.output) if set(axis) & (own - data))


def _free_name(program: Program, weight: str) -> str:
    """``layer.bias`` for ``layer.weight``, or the next free name."""
    stem = weight.removesuffix("weight") + "bias"
    name, count = stem, 1
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    while name in taken:
        name, count = f"{stem}_folded{count}", count + 1
    return name
