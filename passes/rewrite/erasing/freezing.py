"""Values that depend on parameters alone, kept as constants when the parameters lose slices.

A standardised weight is divided by the deviation of all its columns. When columns go, a deviation
computed anew would be another one; the one of the full-size model is known, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir import Program, TensorKind, info
from torchlathe.ir.axes import Resize
from torchlathe.ir.interpreting import ReplaceTensor
from torchlathe.passes.analysis.families import Families

__all__ = ["freeze", "frozen_axes", "frozen_values"]


def frozen_values(
    program: Program, nodes: Iterable[fx.Node], zeroing: ReplaceTensor
) -> dict[fx.Node, Any]:
    """What nodes that read tensors alone hold in the full-size model with zeros.

    Args:
        program: Before anything is erased.
        nodes: The nodes; what they read must depend on no input.
        zeroing: ``(name, tensor) -> tensor``.
    """
    wanted = set(nodes)
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used not in needed:
                needed.add(used)
                waiting.append(used)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in needed:
                continue
            name = info(node).tensor
            if name is not None:
                values[node] = zeroing(name, program.entries[name].tensor).detach()
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return {node: values[node] for node in wanted}


def frozen_axes(
    program: Program, nodes: Iterable[fx.Node], families: Families
) -> dict[str, frozenset[int]]:
    """`Program.frozen` as it is once these nodes are constants.

    An axis may still lose slices where each index of the constant comes from the same index of
    the tensor, since that part of the constant goes with it.

    Args:
        program: Before anything is erased.
        nodes: The nodes; what they read must depend on no input.
        families: Of this program.
    """
    found = dict(program.frozen)
    axis_map = families.axis_map
    for node in nodes:
        mixed = {f.atom.number for f in families if node in f.frozen}
        alike: set[int] = set()
        for term in [term for row in axis_map.results(node) for term in row or ()]:
            numbers = {atom.number for atom in axis_map.atoms_of(term)}
            mixed |= numbers if numbers & mixed else set()
            alike |= numbers
        for name, source in _sources(program, node):
            added = not any(map(len, program.zeroed.get(name, {0: (0,)}).values()))
            axes = {
                axis
                for axis, term in enumerate(axis_map.terms(source))
                if added or not {a.number for a in axis_map.atoms_of(term)} <= alike - mixed
            }
            found[name] = found.get(name, frozenset()) | axes
            if added:  # a constant of constants: whatever that one was computed from
                found |= {n: frozenset(range(9)) for n in program.frozen}
    return found


def _sources(program: Program, node: fx.Node) -> list[tuple[str, fx.Node]]:
    """The tensors that a node depends on, with their nodes."""
    needed, waiting = {node}, [node]
    while waiting:
        for used in waiting.pop().all_input_nodes:
            if used not in needed:
                needed.add(used)
                waiting.append(used)
    return [(name, n) for n in needed if (name := info(n).tensor) is not None]


def freeze(node: fx.Node, value: Any, resize: Resize) -> None:
    """Put a buffer with what is left of the value in the place of a node."""
    if isinstance(value, torch.Tensor):
        _freeze(node, value, resize, resize.axis_map.terms(node))
        return
    rows = resize.axis_map.results(node)
    for taken in list(node.users):
        place: Any = taken.args[1]
        _freeze(taken, value[place], resize, rows[place] or ())


def _freeze(node: fx.Node, value: torch.Tensor, resize: Resize, terms: tuple[Any, ...]) -> None:
    for axis, term in enumerate(terms):
        stays = resize.mask(term)
        if stays is not None and isinstance(value, FakeTensor):
            shape = list(value.shape)
            shape[axis] = int(stays.sum())
            value = value.new_empty(shape)
        elif stays is not None:
            value = value.index_select(axis, stays.nonzero().flatten().to(value.device))
    edit = resize.edit
    name = _free_name(edit.program, node.name)
    constant = edit.add_tensor(name, value.contiguous(), TensorKind.BUFFER)
    # The original has no such tensor.
    edit.record_zeroed(name, 0, torch.zeros(0, dtype=torch.int64))
    edit.replace(node, constant)


def _free_name(program: Program, stem: str) -> str:
    taken: Mapping[str, Any] = {
        **program.entries, **program.aliases, **program.carried, **dict.fromkeys(program.dropped)
    }  # fmt: skip
    name, count = f"{stem}_frozen", 1
    while name in taken:
        name, count = f"{stem}_frozen{count}", count + 1
    return name
