"""Rounding as a projection of the column sweep: GPTQ, with zeros that stay or are chosen in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlathe.passes.rewrite.quantising.grids import Clip, Grid, fit_grid, joined
from torchlathe.passes.rewrite.quantising.refitting import Rounded, best_rows
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.sweeping.masking import Masking
from torchlathe.passes.rewrite.sweeping.sweep import sweep

__all__ = ["Rounding", "grids_of", "swept"]


class Rounding:
    """Rounds to a grid that is fixed, and keeps the codes.

    Args:
        grid: The values that there are; zero is always one of them.
        masking: Which entries are zero, if some are to be; chosen in the same sweep or known.

    Attributes:
        codes: (rows, columns) what each entry was rounded to.
    """

    def __init__(self, grid: Grid, masking: Masking | None = None) -> None:
        self.grid, self.masking = grid, masking
        self.span = 0 if masking is None else masking.span
        shape = (grid.scales.shape[0], grid.columns)
        self.codes = torch.zeros(shape, dtype=grid.form.stored, device=grid.scales.device)

    def look(self, columns: Tensor, ahead: Tensor, pivots: Tensor) -> None:
        """Let the mask be chosen, if there is one; the grid is fixed."""
        if self.masking is not None:
            self.masking.look(columns, ahead, pivots)

    def project(self, columns: Tensor, values: Tensor) -> Tensor:
        """The nearest values of the grid."""
        if self.masking is not None:
            values = self.masking.project(columns, values)
        codes = self.grid.codes(values, columns)
        self.codes[:, columns] = codes
        return self.grid.decoded(codes, columns)


def grids_of(
    weight: Tensor,
    scheme: Scheme,
    clips: Sequence[Clip],
    importance: Tensor | None,
    total: Tensor | None,
) -> list[Grid]:
    """What a matrix may be rounded to; by the first it is rounded to nearest.

    Ranges that are cut are best for weights that stay where they are. In a sweep those that are
    still to come move, by more than what is cut: for most rows the whole range is better then.

    Args:
        weight: (rows, columns).
        scheme: The numbers, and what shares a scale.
        clips: How ranges are chosen, a grid for each.
        importance: As `fit_grid` takes it.
        total: As there.
    """
    return [
        fit_grid(
            weight,
            scheme.weights,
            group=scheme.group,
            symmetric=scheme.symmetric,
            clip=clip,
            importance=importance,
            total=total,
        )
        for clip in clips
    ]


def swept(
    grids: Sequence[Grid],
    matrix: Tensor,
    moment: Tensor,
    *,
    damping: float,
    order: Tensor | None = None,
    masking: Masking | None = None,
) -> tuple[Rounded, float]:
    """Sweep a matrix onto each grid, refit the scales, and take the better one row by row.

    Args:
        grids: What it may be rounded to.
        matrix: (rows, columns), in the type of the scales.
        moment: (columns, columns) of what it is multiplied with.
        damping: Of the moment, relative to the mean of its diagonal.
        order: In which columns are swept.
        masking: Zeros of the matrix as often below itself as there are grids.

    Returns:
        The numbers, and the damping that was used.
    """
    # All in one sweep: rows do not see each other, and the factor is most of the work.
    rounding, below = Rounding(joined(grids), masking), matrix.repeat(len(grids), 1)
    damping = sweep(below, moment, rounding, damping=damping, order=order).damping
    del below
    return best_rows(grids, rounding.codes, matrix, moment, damping), damping
