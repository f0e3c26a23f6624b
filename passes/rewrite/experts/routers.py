"""Routers that can no longer choose some of their experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from torchlathe.ir import Edit, Program, TensorKind
from torchlathe.ir.axes import Atom, AtomIndex, AxisMap, AxisTerms, Resize, rule_of
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.rewrite.erasing.shrink import shrink
from torchlathe.passes.rewrite.experts.relabelling import free_name, relabel, resize_counts

__all__ = ["leave_out"]

aten = torch.ops.aten
# Between logits and scores: what maps minus infinity to something below all else.
_MONOTONE = frozenset({"softmax", "log_softmax", "sigmoid", "to", "_to_copy", "view", "reshape"})


def leave_out(
    program: Program,
    kept: Mapping[ExpertLayer, torch.Tensor],
    *,
    rows: bool,
    by: str,
    told: list[Diagnostic],
) -> None:
    """Leave experts out of their layers, such that no row goes to them.

    Args:
        program: Changed in place, through one edit.
        kept: Per layer the experts that stay, sorted; shape (kept,) int64.
        rows: Take the rows of the router away where that can be done; else mask them.
        by: Text form of the pass.
        told: Where notes go.
    """
    axis_map = program.analysis(AxisTerms)
    index = AtomIndex(axis_map, program.graph)
    masks: dict[ExpertLayer, torch.Tensor] = {}
    shrunk: dict[int, torch.Tensor] = {}
    for layer, stay in kept.items():
        choices = torch.isin(layer.slots(program), stay)
        atom, reason = _router_atom(program, axis_map, index, layer)
        if rows and atom is not None:
            shrunk[atom.number] = choices
            continue
        masks[layer] = choices
        if rows:
            text = f"its router keeps all rows, behind a mask, since {reason}"
            told.append(Diagnostic("note", text, name=layer.name))
    with program.edit(by) as edit:
        if shrunk:
            touched = {node for number in shrunk for node in index.touching[number]}
            shrink(Resize(axis_map, shrunk, edit), touched, {})
        for layer, stay in kept.items():
            _renumber(edit, layer, stay, masks.get(layer))
            for name, axis in layer.tensors.items():
                edit.keep(name, {axis: stay})
            # Zeros in the original do not keep a router from choosing: no such copy is equal.
            program.rewritten |= {*layer.tensors}


def _renumber(
    edit: Edit, layer: ExpertLayer, stay: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Let the reads go by the places of the experts that stay."""
    numbers = torch.zeros(layer.experts, dtype=torch.int64)
    numbers[stay] = torch.arange(len(stay))
    if mask is not None:
        _forbid(edit, layer, mask)
        relabel(edit, layer, numbers)
        return
    if layer.table is not None:
        old = edit.program.tensor(layer.table).detach()
        slots = old.cpu().long()
        left = numbers[slots[torch.isin(slots, stay)]]
        edit.set_tensor(layer.table, left.to(old.device, old.dtype))
    resize_counts(edit, layer, len(stay))


def _forbid(edit: Edit, layer: ExpertLayer, allowed: torch.Tensor) -> None:
    """Add minus infinity to what the router gives the experts that are left out."""
    value = layer.logits.meta["val"]
    penalty = torch.zeros(len(allowed), dtype=value.dtype)
    penalty[~allowed] = -torch.inf
    name = free_name(edit.program, layer, "choice_mask")
    mask = edit.add_tensor(name, penalty.to(value.device), TensorKind.BUFFER)
    output = edit.program.output_node
    for node in dict.fromkeys((layer.logits, *(() if _plain(layer) else (layer.scores,)))):
        users = [user for user in node.users if user is not output]
        masked = edit.call(aten.add.Tensor, (node, mask), like=node)
        edit.replace(node, masked, users=users)


def _plain(layer: ExpertLayer) -> bool:
    """Whether scores are forbidden where logits are."""
    node = layer.scores
    while node is not layer.logits:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        if op_name(node) not in _MONOTONE or len(inputs) != 1:
            return False
        node = inputs[0]
    return True


def _router_atom(
    program: Program, axis_map: AxisMap, index: AtomIndex, layer: ExpertLayer
) -> tuple[Atom | None, str]:
    """The atom of the router's outputs if its units can go, or why they cannot."""
    if not layer.router:
        return None, "its outputs are no axis of their own"
    name, axis = next(iter(layer.router.items()))
    atom = axis_map.terms(program.tensor_nodes[name])[axis]
    assert isinstance(atom, Atom)
    known = {*layer.router.items()}
    for other, node in program.tensor_nodes.items():
        for place, term in enumerate(axis_map.terms(node)):
            here = any(a.number == atom.number for a in axis_map.atoms_of(term))
            if here and (other, place) not in known:
                return None, f"{other} has its outputs among others"
    output = program.output_node
    for node in index.touching[atom.number]:
        if output in node.users and _carries(axis_map, node, atom):
            return None, "its logits are an output of the model"
        if node.op == "call_function" and rule_of(node) is None:
            return None, f"{node} has no rule for axes"
        if any(not isinstance(t, Atom) for t in _terms_with(axis_map, node, atom)):
            return None, f"{node} splits the axis of its outputs"
    return atom, ""


def _carries(axis_map: AxisMap, node: fx.Node, atom: Atom) -> bool:
    return bool(_terms_with(axis_map, node, atom))


def _terms_with(axis_map: AxisMap, node: fx.Node, atom: Atom) -> list[object]:
    """Axes of a node's results that hold an atom."""
    return [
        term
        for terms in axis_map.results(node)
        for term in terms or ()
        if any(a.number == atom.number for a in axis_map.atoms_of(term))
    ]
