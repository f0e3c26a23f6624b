"""Rounding as a projection of the column sweep: GPTQ, with zeros that stay or are chosen in it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlathe.passes.rewrite.quantising.grids import Grid
from torchlathe.passes.rewrite.sweeping.masking import Masking

__all__ = ["Rounding"]


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
