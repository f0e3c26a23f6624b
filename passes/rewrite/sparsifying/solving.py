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

from torchlathe.passes.rewrite.sweeping.masking import Masking
from torchlathe.passes.rewrite.sweeping.patterns import Pattern
from torchlathe.passes.rewrite.sweeping.sweep import check_finite, relative_error, sweep

__all__ = ["Method", "Solved", "scores", "solve"]

Method = Literal["magnitude", "wanda", "sparsegpt"]


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

    Raises:
        Error: The moment is not finite.
    """
    if moment is not None:
        check_finite(moment)
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
    known = pattern.kind == "block"
    projection = Masking(
        (wide.shape[0], wide.shape[1]),
        pattern=None if known else pattern,
        mask=mask if known else torch.ones_like(mask),
    )
    swept = sweep(wide, moment, projection, damping=damping)
    after = relative_error(wide, swept.weight, moment)
    if after > error:
        return Solved(masked, mask, error, magnitude, swept.damping)
    return Solved(swept.weight, projection.mask, after, magnitude, swept.damping)
