"""Which unit of a family each index of an axis belongs to."""

from __future__ import annotations

import torch

from torchlathe.ir.axes import Atom, Concat, Term

__all__ = ["indices_of", "sum_by_unit", "unit_indices"]


def unit_indices(term: Term, number: int) -> torch.Tensor:
    """Which unit of an atom each index of an axis belongs to.

    Args:
        term: A resolved term with static extents.
        number: The atom's number.

    Returns:
        Shape (extent,) int64; -1 where the index belongs to none.
    """
    if isinstance(term, Atom):
        if term.number == number:
            return torch.arange(term.extent)
        return torch.full((term.extent,), -1)
    if isinstance(term, Concat):
        # Dense networks have hundreds of pieces, of which a family is one.
        result = torch.full((term.extent,), -1)
        start = 0
        for piece in term.pieces:
            if not isinstance(piece, Atom) or piece.number == number:
                result[start : start + piece.extent] = unit_indices(piece, number)
            start += piece.extent
        return result
    result = torch.full((1,), -1)
    for factor in term.factors:
        own = unit_indices(factor, number)
        result = torch.maximum(result[:, None], own[None, :]).flatten()
    return result


def indices_of(term: Term, number: int, units: torch.Tensor) -> torch.Tensor:
    """The indices of an axis that belong to some units of an atom.

    Args:
        term: A resolved term with static extents.
        number: The atom's number.
        units: Shape (units of the atom,) bool.

    Returns:
        Sorted, shape (indices,) int64.
    """
    place = _place(term, number)
    if place is not None:
        outer, _, inner = place
        units = (
            units[None, :, None].expand(outer, -1, inner).flatten()
            if place[::2] != (1, 1)
            else units
        )
        return units.nonzero().flatten()
    owner = unit_indices(term, number)
    return (units[owner.clamp_min(0)] & (owner >= 0)).nonzero().flatten()


def sum_by_unit(term: Term, number: int, values: torch.Tensor) -> torch.Tensor:
    """Sum values, one per index of an axis, into the units of an atom.

    Args:
        term: A resolved term with static extents.
        number: The atom's number.
        values: Shape (extent of the term,).

    Returns:
        Shape (units,); the values themselves where each index is a unit of its own.
    """
    place = _place(term, number)
    if place is not None:
        outer, _, inner = place
        return values if outer == inner == 1 else values.reshape(place).sum((0, 2))
    owner = unit_indices(term, number)
    mine = owner >= 0
    total = values.new_zeros(int(owner.max()) + 1)
    return total.index_add_(0, owner[mine], values[mine])


def _place(term: Term, number: int) -> tuple[int, int, int] | None:
    """The extents before, of and after an atom in a product (or alone); None for other terms."""
    if isinstance(term, Atom):
        return (1, term.extent, 1) if term.number == number else None
    if isinstance(term, Concat):
        return None
    outer, own, inner = 1, 0, 1
    for factor in term.factors:
        if not isinstance(factor, Atom) or (own and factor.number == number):
            return None
        if factor.number == number:
            own = factor.extent
        elif own:
            inner *= factor.extent
        else:
            outer *= factor.extent
    return (outer, own, inner) if own else None
