"""Leaving branches out of a program: the mechanics of erasing operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from torchlathe.ir import InputError, Program, info
from torchlathe.ir.axes import Resize
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.edit import Edit, has_effect
from torchlathe.passes.analysis.branches import CATS, PRODUCTS, Branch
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups
from torchlathe.passes.analysis.segments import Segments
from torchlathe.passes.rewrite.branches.liveness import Liveness
from torchlathe.passes.rewrite.erasing.folding import fold_into_bias, folded_constants
from torchlathe.passes.rewrite.erasing.freezing import frozen_axes, frozen_values
from torchlathe.passes.rewrite.erasing.shrink import ZeroedSlices, shrink
from torchlathe.passes.rewrite.erasing.units import indices_of

__all__ = ["erase_branches", "zeroed_by"]

_ATEN = torch.ops.aten


def erase_branches(program: Program, branches: Iterable[Branch], *, by: str = "") -> ZeroedSlices:
    """Leave branches out, with everything that nothing else needs.

    Joints with one operand left become that operand; what a concatenation loses goes from the
    tensors that read it; dead calls, parameters and buffers go.

    Args:
        program: Changed in place, through one edit.
        branches: Of this program's `Segments`. One that is inside of another is no error.
        by: Text form of the pass, for provenance.

    Returns:
        The reference: a function of (name, tensor) that zeroes the parameters of the segments that
        were left out. Applied to the tensors of the program before, it makes the full-size model
        that the changed one equals.

    Raises:
        InputError: A branch that has to stay, by itself or together with those before it.
    """
    liveness = Liveness(program, program.analysis(Segments))
    for branch in branches:
        if branch.exit.graph is not program.graph:
            raise InputError(
                f"{branch.name} is a branch of another program, or of an earlier state of this one",
                hint="take it from program.analysis(Segments)",
            )
        refused = "" if branch.exit in liveness.dead else liveness.take(branch)
        if refused:
            raise InputError(f"{branch.name} cannot be erased: {refused}")
    chosen = list(liveness.effective)
    zeroed = zeroed_by(program, chosen)
    if chosen:
        _Leaving(program, chosen, zeroed).run(by)
    return zeroed


def zeroed_by(program: Program, branches: Iterable[Branch]) -> ZeroedSlices:
    """The function that zeroes what is zero in the model that is equal without these branches."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for branch in branches:
        for name in branch.zeroed:
            shape = program.entries[name].tensor.shape
            found[name] = {0: torch.arange(shape[0] if shape else 1)}
    families = list(_families(branches))
    if families:
        axis_map = program.analysis(ZeroInvariantGroups).axis_map
        nodes = program.tensor_nodes
        for family in families:
            for part in family.zeroed:
                term = axis_map.terms(nodes[part.name])[part.axis]
                every = torch.ones(family.extent, dtype=torch.bool)
                gone = indices_of(term, family.atom.number, every)
                axes = found.setdefault(part.name, {})
                before = axes.get(part.axis, torch.zeros(0, dtype=torch.int64))
                axes[part.axis] = torch.cat([before, gone]).unique()
    return ZeroedSlices(found)


def _families(branches: Iterable[Branch]) -> dict[Family, None]:
    return {family: None for branch in branches for family in branch.families}


class _Leaving:
    """One erase."""

    def __init__(self, program: Program, branches: Sequence[Branch], zeroed: ZeroedSlices) -> None:
        self.program = program
        self.branches = branches
        self.zeroed = zeroed
        self.left_out = {branch.exit: branch.constant for branch in branches}
        self.joints = {joint: None for branch in branches for joint in branch.joints}

    def run(self, by: str) -> None:
        program = self.program
        families = list(_families(self.branches))
        kept = {f.atom.number: torch.zeros(f.extent, dtype=torch.bool) for f in families}
        analysis = program.analysis(ZeroInvariantGroups) if families else None
        folded: Mapping[fx.Node, torch.Tensor] = {}
        frozen: Mapping[fx.Node, Any] = {}
        if analysis is not None:
            frozen = frozen_values(program, {n for f in families for n in f.frozen}, self.zeroed)
            fixed = frozen_axes(program, frozen, analysis)
            folded = folded_constants(program, families, kept, analysis.axis_map, self.zeroed)
        order = [node for node in program.graph.nodes if node in self.joints]
        before = {name: entry.tensor for name, entry in program.entries.items()}
        with program.edit(by) as edit:
            for name, axes in self.zeroed.slices.items():
                for axis, indices in axes.items():
                    edit.record_zeroed(name, axis, indices)
            # From the outputs on: what stands for a joint may be a joint itself.
            for joint in reversed(order):
                self._without(joint, edit)
            program.graph.eliminate_dead_code(has_effect)
            if analysis is not None:
                corrected = frozenset(n for f in families for n in f.corrected)
                resize = Resize(
                    analysis.axis_map, kept, edit, corrected, lambda n: self.zeroed(n, before[n])
                )
                touched = {n for f in families for n in analysis.index.touching[f.atom.number]}
                shrink(resize, touched, frozen)
                program.frozen.update(fixed)
                alive = set(program.graph.nodes)
                for node, delta in folded.items():
                    if node in alive:
                        fold_into_bias(node, delta, resize)
            for joint in order:
                self._unwrap(joint, edit)
            _drop_carried(program)

    def _without(self, joint: fx.Node, edit: Edit) -> None:
        """Take the operands that are left out from a joint."""
        if op_name(joint) in CATS:
            parts: Any = joint.args[0]
            stay = [part for part in parts if part not in self.left_out]
            edit.set_args(joint, (stay, *joint.args[1:]))
            return
        first, second = joint.args[:2]
        gone, rest = (first, second) if first in self.left_out else (second, first)
        held = self.left_out[gone]  # type: ignore[index]
        assert held is not None
        factor, offset = 1.0, 0.0
        if op_name(joint) in PRODUCTS:
            factor = held
        else:
            sign = (1.0 if op_name(joint) == "add" else -1.0) * argument(joint, "alpha", 1)
            factor, offset = (sign, held) if gone is first else (1.0, sign * held)
        assert isinstance(rest, fx.Node)
        edit.replace(joint, _scaled(rest, factor, offset, joint, edit))

    def _unwrap(self, joint: fx.Node, edit: Edit) -> None:
        """A concatenation of one tensor is that tensor."""
        if joint.users and op_name(joint) in CATS:
            parts: Any = joint.args[0]
            if len(parts) == 1:
                edit.replace(joint, parts[0])


def _scaled(rest: fx.Node, factor: float, offset: float, joint: fx.Node, edit: Edit) -> fx.Node:
    """``factor * rest + offset`` in place of a joint."""
    node = rest
    if factor == -1.0:
        node = edit.call(_ATEN.neg.default, (node,), like=joint, before=joint)
    elif factor != 1.0:
        node = edit.call(_ATEN.mul.Tensor, (node, factor), like=joint, before=joint)
    if offset != 0.0:
        node = edit.call(_ATEN.add.Tensor, (node, offset), like=joint, before=joint)
    return node


def _drop_carried(program: Program) -> None:
    """Drop buffers that nobody reads of modules that have lost everything else they had."""
    alive: set[str] = set()
    gone: set[str] = set()
    for node in program.graph.find_nodes(op="placeholder"):
        if (name := info(node).tensor) is not None:
            (alive if node.users else gone).add(name.rpartition(".")[0])
    for name in list(program.carried):
        owner = name.rpartition(".")[0]
        if owner in gone and owner not in alive:
            del program.carried[name]
