"""From a matrix and the second moment of what it is multiplied with to a sparse one.

Source: magnitude is textbook; Wanda is arXiv 2306.11695 (scores ``|W_ij| sqrt(H_jj)``, compared
within a row); SparseGPT is arXiv 2301.00774, as a projection of the column sweep that rounding
shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchlathe.passes.rewrite.quantising.grids import relative_error
from torchlathe.passes.rewrite.quantising.sweep import sweep
from torchlathe.passes.rewrite.sparsifying.patterns import Pattern

__all__ = ["Masking", "Method", "Solved", "scores", "solve"]

Method = Literal["magnitude", "wanda", "sparsegpt"]

# Columns of which SparseGPT chooses together, where the pattern leaves that open.
_TOGETHER = 128


@dataclass(frozen=True)
class Solved:
    """One matrix made sparse.

    Attributes:
        weight: (rows, columns), with zeros where ``mask`` is False.
        mask: Where it may be other than zero.
        error: Relative squared error of the outputs; of the weight where no moment is known.
        magnitude: The same if the smallest magnitudes had gone and nothing else changed.
        damping: What the sweep used; 0 without one.
    """

    weight: Tensor
    mask: Tensor
    error: float
    magnitude: float
    damping: float = 0.0


def scores(weight: Tensor, moment: Tensor | None, method: Method) -> Tensor:
    """What each entry is worth: its square, for Wanda times that of what it reads.

    Squares, since those of a block add up.
    """
    found = weight.square()
    if method == "wanda" and moment is not None:
        found = found * moment.diagonal().clamp_min(0).to(found.dtype)
    return found


class Masking:
    """A projection of the column sweep to zero, where a mask that is chosen on the way says so.

    Args:
        pattern: What the mask has to look like.
        shape: Of the matrix.
        mask: A mask that is known beforehand; None to choose.

    Attributes:
        mask: (rows, columns) bool, where entries stay; complete after the sweep.
    """

    def __init__(
        self, pattern: Pattern, shape: tuple[int, int], mask: Tensor | None = None
    ) -> None:
        self.pattern = pattern
        self._chooses = mask is None
        self.span = 0
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool)
            self.span = pattern.span if pattern.kind == "n:m" else min(_TOGETHER, shape[1])
        self.mask = mask

    def look(self, columns: Tensor, ahead: Tensor, pivots: Tensor) -> None:
        """Choose the mask of the next columns by what losing an entry costs now."""
        if self._chooses:
            self.mask[:, columns] = self.pattern.mask((ahead / pivots).square())

    def project(self, columns: Tensor, values: Tensor) -> Tensor:
        """Zero where the mask says so."""
        return values.masked_fill(~self.mask[:, columns], 0)


def solve(
    weight: Tensor,
    moment: Tensor | None,
    pattern: Pattern,
    method: Method,
    *,
    damping: float = 0.01,
) -> Solved:
    """Make a matrix sparse.

    Args:
        weight: (rows, columns), floating.
        moment: (columns, columns) second moment of what it is multiplied with; None if unknown,
            which only ``"magnitude"`` takes.
        pattern: Where zeros may be.
        method: How they are chosen; ``"sparsegpt"`` also changes what is left, to make up for them.
        damping: Of the sweep, relative to the mean of the moment's diagonal.

    Returns:
        The result, whose error is never above that of masks by Wanda's scores for ``"sparsegpt"``:
        where the damped sweep would do worse, it gives those.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    wide = weight.to(kind if moment is None else moment.dtype)
    plain = pattern.mask(scores(wide, None, "magnitude"))
    smallest = wide.masked_fill(~plain, 0)
    magnitude = relative_error(wide, smallest, moment)
    if method == "magnitude" or moment is None:
        return Solved(smallest, plain, magnitude, magnitude)
    mask = pattern.mask(scores(wide, moment, "wanda"), by_row=True)
    masked = wide.masked_fill(~mask, 0)
    error = relative_error(wide, masked, moment)
    if method == "wanda":
        return Solved(masked, mask, error, magnitude)
    # Blocks span rows and columns that the sweep has passed, so that their mask comes first.
    known = mask if pattern.kind == "block" else None
    projection = Masking(pattern, (wide.shape[0], wide.shape[1]), known)
    swept = sweep(wide, moment, projection, damping=damping)
    after = relative_error(wide, swept.weight, moment)
    if after > error:
        return Solved(masked, mask, error, magnitude, swept.damping)
    return Solved(swept.weight, projection.mask, after, magnitude, swept.damping)
