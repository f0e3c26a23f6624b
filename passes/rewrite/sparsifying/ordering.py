"""An order of columns in which N of M neighbours keep more.

Source: permuting channels for N:M is Pool and Yu (NeurIPS 2021); the search by the best swap of
random pairs of groups is own.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_energy", "search_order"]

# Rows that a search looks at, and elements that it holds at a time.
_ROWS = 1024
_MANY = 2**24


def kept_energy(energy: Tensor, keep: int, span: int) -> float:
    """What the best N:M mask keeps.

    Args:
        energy: (rows, columns), not negative; columns are a multiple of the span.
        keep: The N.
        span: The M.

    Returns:
        The share of the sum of all.
    """
    kept = energy.unflatten(1, (-1, span)).topk(keep, dim=2).values.sum(dtype=torch.float64)
    whole = float(energy.sum(dtype=torch.float64))
    return float(kept) / whole if whole > 0 else 1.0


def search_order(
    energy: Tensor, keep: int, span: int, *, rounds: int, generator: torch.Generator
) -> Tensor:
    """An order of the columns whose best N:M mask keeps no less than it does now, mostly more.

    In each round the groups of neighbours are paired at random, and each pair swaps the two columns
    that gain most. At most 1,024 rows, drawn at random, are looked at.

    Args:
        energy: (rows, columns).
        keep: The N.
        span: The M.
        rounds: How often.
        generator: Of the pairs.

    Returns:
        (columns,) int64: which column comes to each place.
    """
    rows, columns = energy.shape
    seen = energy
    if rows > _ROWS:
        seen = energy[torch.randperm(rows, generator=generator)[:_ROWS]]
    # Columns in one piece, for they are gathered in every round.
    seen = seen.t().contiguous().float()
    order = torch.arange(columns).view(-1, span)
    pairs = order.shape[0] // 2
    for _ in range(rounds if pairs else 0):
        mixed = torch.randperm(order.shape[0], generator=generator)
        ones, others = mixed[:pairs], mixed[pairs : 2 * pairs]
        each = max(1, _MANY // (seen.shape[1] * span**3))
        for start in range(0, pairs, each):
            _swap(order, ones[start : start + each], others[start : start + each], seen, keep)
    found = order.flatten()
    # What is best for some rows might not be for all.
    better = kept_energy(energy[:, found], keep, span) > kept_energy(energy, keep, span)
    return found if better else torch.arange(columns)


def _swap(order: Tensor, ones: Tensor, others: Tensor, seen: Tensor, keep: int) -> None:
    """Let each pair of groups swap the two columns that gain most, if any do."""
    span = order.shape[1]
    first, second = seen[order[ones]], seen[order[others]]  # (pairs, span, rows)
    before = _kept(first, keep) + _kept(second, keep)
    best = torch.zeros_like(before)
    which = torch.full_like(before, -1, dtype=torch.int64)
    for i in range(span):
        # All columns of the other group take the place of column i at once.
        gained = first[:, None].repeat(1, span, 1, 1)
        gained[:, :, i] = second
        lost = second[:, None].repeat(1, span, 1, 1)
        diagonal = torch.arange(span)
        lost[:, diagonal, diagonal] = first[:, i : i + 1].expand(-1, span, -1)
        after = _kept(gained, keep) + _kept(lost, keep) - before[:, None]
        value, j = after.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        which = torch.where(better, i * span + j, which)
    # Rounding alone must not make columns move to and fro.
    moved = best > 1e-6 * before
    a, b = ones[moved], others[moved]
    mine, theirs = which[moved] // span, which[moved] % span
    order[a, mine], order[b, theirs] = order[b, theirs], order[a, mine]


def _kept(groups: Tensor, keep: int) -> Tensor:
    """Sums of what is kept of groups (..., span, rows)."""
    return groups.topk(keep, dim=-2).values.sum((-2, -1))
