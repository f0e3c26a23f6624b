"""Which unit of a family each index of an axis belongs to."""

from __future__ import annotations

import torch

from torchlathe.ir.axes import Atom, Concat, Term

__all__ = ["is_unit_axis", "unit_indices"]


def is_unit_axis(term: Term, number: int) -> bool:
    """Whether index *i* of the axis belongs to unit *i* of the atom, for all of them."""
    return isinstance(term, Atom) and term.number == number


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
