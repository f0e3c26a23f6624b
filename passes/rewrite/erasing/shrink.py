"""Erasing units of families: the mechanics that every structured rewrite shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from torchlathe.ir import InputError, Program
from torchlathe.ir.axes import AxisMap, Resize, rule_of
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.folding import fold_into_bias, folded_constants
from torchlathe.passes.rewrite.erasing.freezing import freeze, frozen_axes, frozen_values
from torchlathe.passes.rewrite.erasing.units import indices_of

__all__ = ["ZeroedSlices", "erase_units", "shrink"]


@dataclass(frozen=True)
class ZeroedSlices:
    """A function of (name, tensor) that zeroes slices; the reference of an exact erase.

    Attributes:
        slices: Per tensor and axis, the indices that become zero.
    """

    slices: Mapping[str, Mapping[int, torch.Tensor]]

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of it with its slices at zero."""
        axes = self.slices.get(name)
        if not axes:
            return tensor
        tensor = tensor.detach().clone()
        for axis, indices in axes.items():
            tensor.index_fill_(axis, indices.to(tensor.device), 0)
        return tensor


def erase_units(
    program: Program, units: Mapping[Family, torch.Tensor], *, by: str = ""
) -> ZeroedSlices:
    """Erase units of families, with everything that follows from it.

    Slices of tensors go, every static integer is recomputed from the axis terms, and norms and
    means that still have to count the erased zeros are corrected.

    Args:
        program: Changed in place, through one edit.
        units: Per family of this program's `ZeroInvariantGroups`, which units to erase; int64
            indices, shape (erased,), in any order.
        by: Text form of the pass, for provenance.

    Returns:
        The reference: a function of (name, tensor) that zeroes the slices which write to the
        erased indices (for some families others, see `Family.zeroed`). Applied to the tensors of
        the program before, it makes the full-size model that an exact erase equals.

    Raises:
        InputError: A family that is pinned, an index out of range, or all units of a family.
    """
    families = program.analysis(ZeroInvariantGroups)
    kept: dict[int, torch.Tensor] = {}
    for family, indices in units.items():
        mask = _mask(family, indices)
        if not bool(mask.all()):
            kept[family.atom.number] = mask
    chosen = [f for f in units if f.atom.number in kept]
    axis_map, index = families.axis_map, families.index
    zeroed = _zeroed_slices(program, chosen, kept, axis_map)
    touched: set[fx.Node] = set()
    for family in chosen:
        touched.update(index.touching[family.atom.number])
    corrected = frozenset(node for family in chosen for node in family.corrected)
    zeros = ZeroedSlices(zeroed)
    folded = folded_constants(program, chosen, kept, axis_map, zeros)
    frozen = frozen_values(program, {n for f in chosen for n in f.frozen}, zeros)
    fixed = frozen_axes(program, frozen, families)
    with program.edit(by) as edit:
        program.frozen.update(fixed)
        before = {name: entry.tensor for name, entry in program.entries.items()}
        resize = Resize(axis_map, kept, edit, corrected, lambda name: zeros(name, before[name]))
        for name, axes in zeroed.items():
            for axis, indices in axes.items():
                edit.record_zeroed(name, axis, indices)
        shrink(resize, touched, frozen)
        for node, delta in folded.items():
            fold_into_bias(node, delta, resize)
    return zeros


def shrink(resize: Resize, touched: set[fx.Node], frozen: Mapping[fx.Node, torch.Tensor]) -> None:
    """Cut the tensors that are read, and recompute every static integer behind them.

    Args:
        resize: What is kept of each atom, and the edit to change the program through.
        touched: Nodes that carry an atom of which units go.
        frozen: Nodes that become constants, with their values.
    """
    program, edit = resize.edit.program, resize.edit
    for name, node in program.tensor_nodes.items():
        masks = {
            axis: stay
            for axis, term in enumerate(resize.axis_map.terms(node))
            if node.users and (stay := resize.indices(term)) is not None
        }
        if masks:
            edit.keep(name, masks)
    for node in list(program.graph.nodes):
        if node in frozen:
            freeze(node, frozen[node], resize)
        elif node in touched and node.op == "call_function":
            rule = rule_of(node)
            assert rule is not None, node
            edit.set_shape(node, resize.shapes(node))
            rule.resize(node, resize)
    _allow_other_strides(program)


def _allow_other_strides(program: Program) -> None:
    """Let every view be a reshape, which is the same where strides are as they were.

    Ops such as attention choose the memory order of their result by the sizes, and a view of
    erased sizes may then ask for a copy. In a functional graph the two mean the same.
    """
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


def _mask(family: Family, indices: torch.Tensor) -> torch.Tensor:
    if not family.prunable:
        why = f": {family.pins[0]}" if family.pins else ""
        raise InputError(f"units of {family.name} cannot be erased{why}")
    mask = torch.ones(family.extent, dtype=torch.bool)
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < family.extent):
        raise InputError(
            f"{family.name} has units 0 to {family.extent - 1}, asked to erase "
            f"{int(indices.min())} to {int(indices.max())}"
        )
    mask[indices.cpu().long()] = False
    if not bool(mask.any()):
        raise InputError(
            f"all {family.extent} units of {family.name} would be erased",
            hint="keep at least one; to remove whole layers is another pass",
        )
    return mask


def _zeroed_slices(
    program: Program,
    chosen: list[Family],
    kept: Mapping[int, torch.Tensor],
    axis_map: AxisMap,
) -> dict[str, dict[int, torch.Tensor]]:
    """Per tensor and axis that is zero in the equal model, the indices that erased units own."""
    nodes = program.tensor_nodes
    found: dict[str, dict[int, torch.Tensor]] = {}
    for family in chosen:
        erased = ~kept[family.atom.number]
        for part in family.zeroed:
            term = axis_map.terms(nodes[part.name])[part.axis]
            gone = indices_of(term, family.atom.number, erased)
            axes = found.setdefault(part.name, {})
            if part.axis in axes:
                gone = torch.cat([axes[part.axis], gone]).unique()
            axes[part.axis] = gone
    return found
