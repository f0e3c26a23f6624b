"""Scales once more after a sweep, and of several sweeps the better one for each row.

A sweep takes its grid as given, and that was fitted to the weights as they were, each for itself.
Afterwards the numbers are known, and the outputs are linear in the scales of a row: with ``Q_g``
what the numbers of group g stand for, the best factors ``1 + d`` of its scales solve

    sum_h (Q_g' H Q_h) d_h = Q_g' H (w - Q 1)        for each g

which are as many equations as a row has groups.

Source: least squares for given numbers as in Two-stage GPTQ (arXiv 2602.02126, stage 2; a
reconstruction: there one scale follows the other, here all of a row are solved for at once). Taking
the better of two sweeps for each row is own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchlathe.passes.rewrite.quantising.grids import Grid, grouped

__all__ = ["Rounded", "best_rows", "refitted"]

# Of the mean of the equations' diagonal, towards the scales as they are.
_RIDGE = 1e-4
# Factors further from 1 come from groups in which there is next to nothing.
_FURTHEST = 0.5
# Elements that are held in one piece.
_MANY = 2**22


@dataclass(frozen=True)
class Rounded:
    """A matrix of numbers on a grid.

    Attributes:
        grid: What the numbers stand for.
        codes: (rows, columns) the numbers.
        losses: (rows,) squared errors of the outputs.
    """

    grid: Grid
    codes: Tensor
    losses: Tensor

    @classmethod
    def of(
        cls, grid: Grid, codes: Tensor, weight: Tensor, moment: Tensor, damping: float = 0.0
    ) -> Rounded:
        """Numbers with what they lose.

        Args:
            grid: What the numbers stand for.
            codes: (rows, columns).
            weight: (rows, columns), what they are to stand for.
            moment: (columns, columns) of what the matrix is multiplied with.
            damping: Added to the moment's diagonal, relative to its mean: what few rows of data
                show is not all that there is.
        """
        white = damping * moment.diagonal().mean()
        losses = weight.new_empty(len(weight), dtype=moment.dtype)
        few = max(1, _MANY // grid.columns)
        for rows, old, new in zip(
            losses.split(few), weight.split(few), grid.decoded(codes).split(few), strict=True
        ):
            lost = (new - old).to(moment.dtype)
            rows.copy_((lost @ moment).add_(lost * white).mul_(lost).sum(1))
        return cls(grid, codes, losses)

    def or_better(self, other: Rounded) -> Rounded:
        """Of each row that which loses less; of equals the own."""
        better = other.losses < self.losses
        return Rounded(
            _chosen(better, other.grid, self.grid),
            torch.where(better[:, None], other.codes, self.codes),
            torch.where(better, other.losses, self.losses),
        )


def best_rows(
    grids: Sequence[Grid], codes: Tensor, weight: Tensor, moment: Tensor, damping: float
) -> Rounded:
    """Of several sweeps of a matrix, refitted, the better one for each row.

    Args:
        grids: Of each sweep.
        codes: (sweeps * rows, columns) below each other.
        weight: (rows, columns).
        moment: (columns, columns), as for `Rounded.of`.
        damping: As for `Rounded.of`.
    """
    best: Rounded | None = None
    for grid, own in zip(grids, codes.chunk(len(grids)), strict=True):
        found = Rounded.of(grid, own, weight, moment, damping)
        found = refitted(found, weight, moment, damping)
        best = found if best is None else best.or_better(found)
    assert best is not None
    return best


def refitted(rounded: Rounded, weight: Tensor, moment: Tensor, damping: float = 0.0) -> Rounded:
    """The same numbers with the scales that suit them best; never worse in any row.

    Args:
        rounded: Numbers on a grid.
        weight: (rows, columns), what they are to stand for.
        moment: (columns, columns), as for `Rounded.of`.
        damping: As for `Rounded.of`.

    Returns:
        With scales as they can be stored; those of formats that store no floating scales stay.
    """
    grid = rounded.grid
    if grid.form.scales != "float":
        return rounded
    groups = grid.scales.shape[1]
    white = damping * moment.diagonal().mean()
    stored, changes = grid.stored.clone(), torch.zeros_like(rounded.losses)
    few = max(1, _MANY // max(grid.columns, groups * groups))
    for start in range(0, len(weight), few):
        rows = slice(start, start + few)
        part = grid.rows(rows)
        now = part.decoded(rounded.codes[rows]).to(moment.dtype)
        lost = weight[rows].to(moment.dtype) - now
        products, wanted = _equations(now, lost, moment, white, grid.group)
        new = (part.scales * _factors(products, wanted)).to(stored.dtype)
        moved = new.to(moment.dtype) / part.scales.to(moment.dtype) - 1
        curved = (products @ moved[..., None])[..., 0]
        changes[rows] = (moved * (curved - 2 * wanted)).sum(1)
        stored[rows] = new
    scales = stored.to(grid.scales.dtype)
    better = changes < 0
    return Rounded(
        _chosen(better, replace(grid, stored=stored, scales=scales), grid),
        rounded.codes,
        (rounded.losses + changes.clamp(max=0)).clamp_min(0),
    )


def _factors(products: Tensor, wanted: Tensor) -> Tensor:
    """What the scales of rows are multiplied with, (rows, groups)."""
    ridge = _RIDGE * products.diagonal(dim1=1, dim2=2).mean(1)
    ridge = ridge.clamp_min(torch.finfo(products.dtype).tiny)
    unit = torch.eye(wanted.shape[1], dtype=products.dtype, device=products.device)
    found, _ = torch.linalg.solve_ex(products + ridge[:, None, None] * unit, wanted[..., None])
    moved: Tensor = found[..., 0].nan_to_num(0)
    return torch.where(moved.abs() < _FURTHEST, moved, torch.zeros_like(moved)) + 1


def _equations(
    now: Tensor, lost: Tensor, moment: Tensor, white: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """Products of a row's groups with one another, and with what is lost.

    Returns:
        (rows, groups, groups) and (rows, groups).
    """
    width = group or now.shape[1]
    places = range(0, now.shape[1], width)
    products = now.new_empty(len(now), len(places), len(places))
    wanted = now.new_empty(len(now), len(places))
    for number, start in enumerate(places):
        own = slice(start, start + width)
        read = now[:, own] @ moment[own]
        read[:, own] += white * now[:, own]
        wanted[:, number] = (read * lost).sum(1)
        products[:, number] = grouped(read.mul_(now), group).sum(2)
    return products, wanted


def _chosen(first: Tensor, one: Grid, two: Grid) -> Grid:
    """The rows of one grid where a mask says so, else those of another."""
    own = first[:, None]
    zeros = two.zeros
    if one.zeros is not None and two.zeros is not None:
        zeros = torch.where(own, one.zeros, two.zeros)
    return replace(
        two,
        scales=torch.where(own, one.scales, two.scales),
        stored=torch.where(own, one.stored, two.stored),
        zeros=zeros,
    )
