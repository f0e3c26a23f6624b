"""The geometric median: which units are most like the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchlathe.passes.analysis.families import Family
from torchlathe.passes.importance.criterion import Criterion, Scoring

__all__ = ["GeometricMedian"]

# Rows of the distance matrix at a time; all of it would be the square of the extent.
_CHUNK = 1024


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """Sum of the Euclidean distances from a unit's filter to those of all other units.

    The filter is all that *writes* the unit, end to end: a unit whose filter is near the median
    of all can be replaced by the others, whatever reads it.

    Source: FPGM, arXiv 1811.00250, equation 4; coupled writers end to end are own.
    """

    name: ClassVar[str] = "geometric-median"

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """``sum over v of ||x_u - x_v||``."""
        return {family: _distances(scoring, family) for family in scoring.chosen}


def _distances(scoring: Scoring, family: Family) -> torch.Tensor:
    parts = [part for part in scoring.owned(family) if part.writes]
    matrices = [scoring.rows(family, part).to("cpu", torch.float64) for part in parts]
    norms = torch.zeros(family.extent, dtype=torch.float64)
    # Distances are taken from inner products; those of centred rows lose fewer digits.
    matrices = [matrix - matrix.mean(0) for matrix in matrices]
    for matrix in matrices:
        norms += matrix.square().sum(1)
    found = torch.zeros(family.extent, dtype=torch.float64)
    for start in range(0, family.extent, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        squares = norms[chunk, None] + norms[None, :]
        for matrix in matrices:
            squares -= 2 * matrix[chunk] @ matrix.T
        rows = torch.arange(squares.shape[0])
        squares[rows, rows + start] = 0  # but for rounding it is
        found[chunk] = squares.clamp_min(0).sqrt().sum(1)
    return found
