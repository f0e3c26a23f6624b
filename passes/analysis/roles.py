"""Which axes of parameters write to the result of an op, and which are only read.

An axis that an op sums over only reads what others wrote there. Roles belong to an axis and an
atom, since one axis may hold both: the input axis of a grouped transposed convolution is
``groups x channels``, where the groups reach the result and the channels are summed over.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from torchlathe.ir import Program, info
from torchlathe.ir.axes import AtomIndex, Pointwise, Structural, rule_of
from torchlathe.ir.axes.rules.shaping import Permute
from torchlathe.ir.axes.rules.slicing import GetItem

__all__ = ["Role", "constant_nodes", "written_axes"]

# (result, axis, atom number); the result is 0 but for an op with several.
Role = tuple[int, int, int]


def written_axes(program: Program, index: AtomIndex) -> dict[fx.Node, set[Role]]:
    """Per tensor placeholder, the axes and atoms that reach the result of the op that uses it.

    Tensors may pass through views, casts and products of each other first, so the answer is
    found backwards through everything that depends on tensors alone.
    """
    constant = constant_nodes(program)
    written: dict[fx.Node, set[Role]] = {}
    for node in reversed(list(program.graph.nodes)):
        if node in constant:
            roles: set[Role] = set()
            for user in node.users:
                roles |= _written_by(user, node, index, written if user in constant else {})
            written[node] = roles
    return written


def constant_nodes(program: Program) -> set[fx.Node]:
    """Nodes that depend on the program's tensors, and on no input."""
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if info(node).tensor is not None:
                constant.add(node)
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if inputs and all(used in constant for used in inputs):
                constant.add(node)
    return constant


def _roles(node: fx.Node, index: AtomIndex) -> set[Role]:
    return {
        (result, axis, atom)
        for result, axes in enumerate(index.results(node))
        for axis, atoms in enumerate(axes)
        for atom in atoms
    }


def _written_by(
    user: fx.Node, node: fx.Node, index: AtomIndex, written: Mapping[fx.Node, set[Role]]
) -> set[Role]:
    """Roles of a tensor that one of its users writes to its result."""
    rule = rule_of(user) if user.op == "call_function" else None
    if rule is None:
        return _roles(node, index)
    if isinstance(rule, GetItem):
        place = user.args[1]
        assert isinstance(place, int)
        mine = {role for role in _roles(node, index) if role[0] == place}
        after = written.get(user)
        return mine if after is None else {(place, axis, atom) for _, axis, atom in after}
    direct = _not_read(user, node, index)
    if user not in written:
        return direct
    after = written[user]
    reached = {atom for _, _, atom in after}
    found = {role for role in direct if role[2] in reached}
    if isinstance(rule, Permute):
        order = rule.order(user, len(index.axes(node)))
        return {(0, order[axis], atom) for _, axis, atom in after}
    if isinstance(rule, Structural | Pointwise):
        return _refined(user, node, index, found, after)
    return found


def _not_read(user: fx.Node, node: fx.Node, index: AtomIndex) -> set[Role]:
    """Roles of an operand but for those that the op sums over."""
    layout = index.axis_map.layouts.get(user)
    rule = rule_of(user)
    assert rule is not None
    if layout is None or not layout.factors:
        read = rule.reads(user, node, layout)
        return {role for role in _roles(node, index) if role[1] not in read}
    contracted = layout.contracted
    return {
        (0, axis, atom.number)
        for used, axes in (*layout.factors, *layout.addends)
        if used is node
        for axis, letters in enumerate(axes)
        for letter in letters
        if letter not in contracted
        for atom in index.axis_map.atoms_of(layout.letters[letter])
    }


def _refined(
    user: fx.Node, node: fx.Node, index: AtomIndex, found: set[Role], after: set[Role]
) -> set[Role]:
    """Tell two axes with the same atom apart, by where each of them goes."""
    atoms = [atom for _, _, atom in found]
    if len(atoms) == len(set(atoms)):
        return found
    before, behind = _occurrences(node, index), _occurrences(user, index)
    if isinstance(user.meta["val"], torch.Tensor) and (
        [atom for _, atom in before] == [atom for _, atom in behind]
    ):
        # Elements keep their order, so that the nth occurrence stays the nth.
        moved = zip(before, behind, strict=True)
        return {(0, a, atom) for (a, atom), (b, _) in moved if (0, b, atom) in after}
    shift = len(index.results(user)[0]) - len(index.axes(node))
    reached = {(axis - shift, atom) for _, axis, atom in after}
    aligned = {role for role in found if role[1:] in reached}
    return aligned if {atom for _, _, atom in aligned} == set(atoms) else found


def _occurrences(node: fx.Node, index: AtomIndex) -> list[tuple[int, int]]:
    """(axis, atom) in row-major order, with repetitions."""
    axis_map = index.axis_map
    return [
        (axis, atom.number)
        for axis, term in enumerate(axis_map.terms(node))
        for atom in axis_map.atoms_of(term)
    ]
