"""Zeros as a projection of the column sweep: SparseGPT.

Source: arXiv 2301.00774, algorithm 1: an entry's score is its square over that of the pivot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlathe.passes.rewrite.sweeping.patterns import Pattern

__all__ = ["Masking"]

# Columns of which a mask is chosen together, where the pattern leaves that open.
_TOGETHER = 128


class Masking:
    """A projection to zero, where a mask that is known, or chosen on the way, says so.

    Args:
        shape: Of the matrix.
        pattern: What a mask that is chosen has to look like.
        mask: Where entries may stay, as is known beforehand; a pattern chooses among these, and
            writes into it.

    Attributes:
        mask: (rows, columns) bool, where entries stay; complete after the sweep.
        span: See `torchlathe.passes.rewrite.sweeping.sweep.Projection`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        pattern: Pattern | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self._pattern, self.span = pattern, 0
        if pattern is not None:
            self.span = pattern.span if pattern.kind == "n:m" else min(_TOGETHER, shape[1])
        self.mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask

    def look(self, columns: Tensor, ahead: Tensor, pivots: Tensor) -> None:
        """Choose the mask of the next columns by what losing an entry costs now."""
        if self._pattern is not None:
            own = self.mask[:, columns]
            self.mask[:, columns] = self._pattern.mask_among(own, (ahead / pivots).square())

    def project(self, columns: Tensor, values: Tensor) -> Tensor:
        """Zero where the mask says so."""
        return values.masked_fill(~self.mask[:, columns], 0)
