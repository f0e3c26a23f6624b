"""The column sweep: project one column after the other, and let the others make up for it.

With the second moment ``H = E[x x']`` of what a matrix W is multiplied with, changing column j by
``e`` costs least if the columns that are still to come move by ``-e U[j, j+1:] / U[j, j]``, where
``H^-1 = U' U`` with U upper triangular. What the column changes *to* is up to a `Projection`:
rounding to a grid is GPTQ, zeroing where a mask says so is SparseGPT, and both at once is a
projection that does both.

Source: GPTQ (arXiv 2210.17323, algorithm 1, and its lazy batches); OBC (arXiv 2208.11580) for the
update; SparseGPT (arXiv 2301.00774) for masks that are chosen on the way. U is found here by one
Cholesky factorisation from the end and one triangular inverse, with no inverse of H in between: two
matrices of the size of H are held beside it, which for wide layers is most of what a sweep takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torchlathe.ir import Error, InputError

__all__ = [
    "Projection",
    "Swept",
    "check_finite",
    "damping_of",
    "naming",
    "order_by_activity",
    "relative_error",
    "sweep",
]

_BLOCK = 128
# The largest share of the identity in a moment.
_MOST = 0.999
# Elements of a matrix that are looked at together.
_MANY = 2**21


class Projection(Protocol):
    """What the columns of a matrix become, one after the other.

    Attributes:
        span: How many columns ahead it wants to see, at each multiple of that; 0 for never.
    """

    span: int

    def look(self, columns: Tensor, ahead: Tensor, pivots: Tensor) -> None:
        """See the next columns as they are by now, before the first of them is projected.

        This is where a mask is chosen (by ``(ahead / pivots) ** 2``, SparseGPT's criterion), or
        where scales are fitted.

        Args:
            columns: Which columns of the matrix these are, (n,) int64; n is ``span`` or less.
            ahead: (rows, n).
            pivots: (n,) diagonal of U: changing a column by e costs ``(e / pivot) ** 2``.
        """

    def project(self, columns: Tensor, values: Tensor) -> Tensor:
        """What a column becomes; it is called once for each, in the order of the sweep.

        Args:
            columns: Which column, (1,) int64.
            values: (rows, 1) as it is by now.

        Returns:
            (rows, 1).
        """


@dataclass(frozen=True)
class Swept:
    """What a sweep made.

    Attributes:
        weight: The projected matrix, (rows, columns), in the type of the moment.
        damping: What was added to the diagonal of the moment, relative to its mean.
    """

    weight: Tensor
    damping: float


def order_by_activity(moment: Tensor) -> Tensor:
    """The columns that the data excites most first: these have most others to make up for them."""
    return moment.diagonal().argsort(descending=True, stable=True)


def sweep(
    weight: Tensor,
    moment: Tensor,
    projection: Projection,
    *,
    damping: float = 0.01,
    order: Tensor | None = None,
    block: int = _BLOCK,
) -> Swept:
    """Project every column of a matrix, with the error of each made up for by those after it.

    Args:
        weight: (rows, columns).
        moment: (columns, columns), symmetric; float32 or float64, which all is computed in.
        projection: What a column becomes.
        damping: Added to the diagonal, relative to its mean; it is raised tenfold as often as the
            moment has no Cholesky factor.
        order: The columns in the order of the sweep; by default as they are.
        block: Columns whose effect on those far ahead is applied at once. It is made a multiple
            of the projection's span, so that what `Projection.look` sees is up to date.

    Returns:
        The projected matrix. Columns that no data excites are projected as they are.

    Raises:
        Error: The moment is not finite.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device) if order is None else order
    # Transposed, so that a column lies in one piece.
    work = weight.to(moment.dtype)[:, order].t().contiguous()
    flipped, used = _factor(moment, order, damping)
    span = projection.span
    block = max(block // span, 1) * span if span else block
    done, places = torch.empty_like(work), order.tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        rows = slice(columns - stop, columns - start)
        here = flipped[rows, rows].flip(0, 1)
        part = work[start:stop]
        for j in range(stop - start):
            if span and j % span == 0:
                ahead = slice(j, min(j + span, stop - start))
                own = order[start:stop][ahead]
                projection.look(own, part[ahead].t(), here.diagonal()[ahead])
            new = projection.project(order[start + j : start + j + 1], part[j][:, None])[:, 0]
            done[places[start + j]] = new
            # From here on the row holds the error instead of the value.
            part[j].sub_(new).div_(here[j, j])
            part[j + 1 :].addr_(here[j, j + 1 :], part[j], alpha=-1)
        work[stop:].addmm_(flipped[rows, : columns - stop].flip(0, 1).t(), part, alpha=-1)
    return Swept(done.t(), used)


def damping_of(moment: Tensor, rows: int, least: float) -> float:
    """How much a moment of so many rows is to be damped, relative to the mean of its diagonal.

    A moment of few rows shows directions in which nothing seems to matter and others that seem to
    matter more than they do: what a sweep makes up for on these rows it spoils on others. Damping
    is shrinkage towards a multiple of the identity, ``(1 - r) H + r mean``, and its best share r
    can be told from H itself: for rows that are drawn from a normal distribution

        r = ((1 - 2/p) tr(H^2) + tr(H)^2) / ((n + 1 - 2/p) (tr(H^2) - tr(H)^2 / p)),  at most 1

    with p columns and n rows. Where all directions are alike it is 1, and the sweep rounds to
    nearest.

    Source: oracle approximating shrinkage, Chen, Wiesel, Eldar and Hero (IEEE Transactions on
    Signal Processing 58, 2010, equation 23); its use here is own.

    Args:
        moment: (columns, columns).
        rows: How many it is the mean of.
        least: What it is at least.
    """
    columns = len(moment)
    trace = float(moment.diagonal().sum())
    squares = sum(float(part.square().sum()) for part in moment.split(256))
    apart = squares - trace * trace / columns
    if not math.isfinite(apart) or trace <= 0 or columns < 2:
        return least
    over = (1 - 2 / columns) * squares + trace * trace
    under = (rows + 1 - 2 / columns) * apart
    # At the end a thousand times the mean: rounding to nearest, but for rounding.
    share = _MOST if over >= _MOST * under else over / under
    return max(least, share / (1 - share))


@contextmanager
def naming(layer: str, done: str = "swept") -> Iterator[None]:
    """Say of an error about data which layer it is about, and what cannot be done to that.

    Raises:
        InputError: Whatever `sweep` or `check_finite` raised.
    """
    try:
        yield
    except Error as error:
        raise InputError(
            f"{layer} cannot be {done}: {error.message}",
            where=layer,
            hint="look for NaN and infinity in the calibration data and in the layers before",
        ) from error


def check_finite(moment: Tensor) -> None:
    """Refuse a moment of data that has NaN or infinity in it.

    Raises:
        Error: It is not finite.
    """
    if not math.isfinite(float(moment.sum())):
        raise Error("the data that a layer reads has values that are not finite")


def _factor(moment: Tensor, order: Tensor, damping: float) -> tuple[Tensor, float]:
    """U with ``(H + damping)^-1 = U' U``, last row and column first, and the damping that it took.

    H is the moment with its columns in the order of the sweep.
    """
    mean = float(moment.diagonal().mean())
    check_finite(moment)
    if mean <= 0:
        # No data excites anything: there is nothing to make up for.
        return torch.eye(len(moment), dtype=moment.dtype, device=moment.device), damping
    back = order.flip(0)
    while True:
        damped = moment[back[:, None], back]
        damped.diagonal().add_(damping * mean)
        # Column by column the inverse of a lower factor of the flipped matrix, flipped back, is U.
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not bool(failed) and math.isfinite(float(lower.sum())):
            found = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            torch.linalg.solve_triangular(lower, found, upper=False, out=found)
            if math.isfinite(float(found.sum())):
                return found, damping
        damping = max(10 * damping, 1e-6)
        if damping > 1e6:
            raise Error("the second moment of what a layer reads is no moment: it has no factor")


def relative_error(weight: Tensor, after: Tensor, moment: Tensor | None = None) -> float:
    """Squared error of the outputs of a matrix, over their squares.

    Args:
        weight: (rows, columns).
        after: What takes its place.
        moment: (columns, columns) second moment of what it is multiplied with; None for white.
    """
    dtype = torch.float64 if moment is None else moment.dtype
    whole = lost = 0.0
    # A few rows at a time: wide copies of a whole layer would be most of what a pass holds.
    few = max(1, _MANY // max(1, weight.shape[1]))
    for old, new in zip(weight.split(few), after.split(few), strict=True):
        wide = old.to(dtype)
        whole += _squares(wide, moment)
        lost += _squares(new.to(dtype) - wide, moment)
    return max(0.0, lost) / max(whole, torch.finfo(dtype).tiny)


def _squares(matrix: Tensor, moment: Tensor | None) -> float:
    if moment is None:
        return float(matrix.square().sum())
    return float((matrix @ moment).mul_(matrix).sum())
