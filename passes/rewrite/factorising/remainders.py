"""Low rank plus sparse: a product of two factors, and some rows of the matrix as they are.

``W = U V + S`` where ``S`` has few rows that are not zero. A row that ``S`` holds needs no row of
``U`` as well: the remainder holds those rows of ``W`` whole, ``U`` has the others only, and the two
are the best for one another in the norm of `torchlathe.passes.rewrite.factorising.splits`. Rows are
told apart by energies, sums of squares that cannot cancel, as signed sums of a row's elements do.

Source: LoSparse, arXiv 2306.11222, where rows of ``S = W - U V`` are pruned while the model trains,
by the sensitivity of the loss. Choosing them at once by what they lose, and the alternation, own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlathe.passes.rewrite.factorising.splits import Split, damped, gram_energy, split

__all__ = ["RowSplit", "kept_rows", "remainder_split", "residual_rows"]

_ROUNDS = 4


@dataclass(frozen=True)
class RowSplit:
    """Matrices of one shape, each as a product and the same few rows as they are.

    Attributes:
        rows: Which rows are kept whole, ascending, int64.
        kept: Per matrix those rows, (rows, ins).
        parts: Per matrix the product that stands for the other rows, in their order; None if all
            rows are kept.
        error: Squared error in the norm of the split, of all matrices.
        energy: Squared norm of the matrices themselves in that norm.
    """

    rows: torch.Tensor
    kept: tuple[torch.Tensor, ...]
    parts: tuple[Split, ...] | None
    error: float
    energy: float

    @property
    def order(self) -> torch.Tensor:
        """Where row ``j`` of the matrix is in the product's rows with the kept ones behind them."""
        outs = self.kept[0].shape[0] + (0 if self.parts is None else self.parts[0].up.shape[0])
        return torch.argsort(torch.cat([_others(outs, self.rows), self.rows]))

    def product(self, index: int = 0) -> torch.Tensor:
        """The matrix that the split of one of them stands for, (outs, ins)."""
        if self.parts is None:
            return self.kept[index][self.order]
        return torch.cat([self.parts[index].product, self.kept[index]])[self.order]


def kept_rows(outs: int, share: float) -> int:
    """How many rows a share of them is: to the nearest, but one at least where it is above zero."""
    return min(outs, max(1, round(share * outs))) if share > 0 else 0


def remainder_split(
    weights: Sequence[torch.Tensor],
    rank: int,
    count: int,
    *,
    inputs: Sequence[torch.Tensor | None] | None = None,
    rows: Sequence[torch.Tensor | None] | None = None,
    damping: float = 0.0,
    randomised: bool | None = None,
    seed: int = 0,
) -> RowSplit:
    """The rows that a product of this rank misses most, and the best product for the others.

    Both are found in turn, each the best for the other, until the rows stay or the error does not
    fall; it never rises. They begin twice, with the rows that the product of all rows misses most,
    and with those that take a direction of their own in it; the better end is taken.

    Args:
        weights: Shapes (outs, ins), one matrix or several (experts) with one pattern of rows.
        rank: Columns of the first factors, at least 1.
        count: Rows that are kept, 1 to outs.
        inputs: Per matrix the second moment of its inputs, as `splits.split` takes it.
        rows: Per matrix the weight of each row's squared error, as there.
        damping: As there.
        randomised: As there.
        seed: As there.

    Raises:
        ValueError: ``count`` is not between 1 and the rows that there are.
    """
    outs = int(weights[0].shape[0])
    if not 1 <= count <= outs:
        raise ValueError(f"{count} rows of {outs}")
    inputs = [None] * len(weights) if inputs is None else inputs
    rows = [None] * len(weights) if rows is None else rows
    cases = list(zip(weights, inputs, rows, strict=True))

    def fitted(others: torch.Tensor) -> list[Split]:
        return [
            split(
                weight[others],
                rank,
                inputs=moment,
                rows=None if scale is None else scale[others],
                damping=damping,
                randomised=randomised,
                seed=seed,
            )
            for weight, moment, scale in cases
        ]

    energy = sum(
        float(_weighted(gram_energy(w.detach().double(), damped(a, damping, w)), s).sum())
        for w, a, s in cases
    )
    everything = torch.arange(outs, device=weights[0].device)
    if count == outs:
        return RowSplit(everything, tuple(w.detach() for w in weights), None, 0.0, energy)
    first = fitted(everything)
    missed = _missed(cases, first, damping)
    starts = missed, missed + _freed(first, cases)

    def refined(score: torch.Tensor) -> tuple[float, torch.Tensor, list[Split]]:
        best: tuple[float, torch.Tensor, list[Split]] | None = None
        for _ in range(_ROUNDS):
            chosen = score.topk(count).indices.sort().values
            if best is not None and torch.equal(chosen, best[1]):
                break
            parts = fitted(_others(outs, chosen))
            error = sum(part.error for part in parts)
            if best is not None and error >= best[0]:
                break
            best = error, chosen, parts
            score = _missed(cases, parts, damping)
        assert best is not None
        return best

    error, chosen, parts = min(map(refined, starts), key=lambda found: found[0])
    kept = tuple(weight.detach()[chosen].contiguous() for weight in weights)
    return RowSplit(chosen, kept, tuple(parts), error, energy)


def residual_rows(
    weight: torch.Tensor, down: torch.Tensor, moment: torch.Tensor | None
) -> torch.Tensor:
    """What each row of a matrix loses if it is made of the rows of another as well as can be.

    Args:
        weight: Shape (outs, ins).
        down: Shape (rank, ins).
        moment: Second moment of the inputs, (ins, ins) float64; None for the identity.

    Returns:
        Squared errors, (outs,) float64, none below zero.
    """
    wide, basis = weight.detach().double(), down.detach().double()
    read = basis if moment is None else basis @ moment
    crossed = wide @ read.T
    gram = read @ basis.T
    caught = (crossed @ torch.linalg.pinv((gram + gram.T) / 2, hermitian=True)) * crossed
    missed: torch.Tensor = (gram_energy(wide, moment) - caught.sum(1)).clamp_min(0)
    return missed


def _missed(
    cases: Sequence[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]],
    parts: Sequence[Split],
    damping: float,
) -> torch.Tensor:
    """What each row loses beyond the factors that read the input, over all matrices."""
    found = [
        _weighted(residual_rows(weight, part.down, damped(moment, damping, weight)), scale)
        for (weight, moment, scale), part in zip(cases, parts, strict=True)
    ]
    return torch.stack(found).sum(0)


def _freed(parts: Sequence[Split], cases: Sequence[tuple[torch.Tensor, Any, Any]]) -> torch.Tensor:
    """What the product could catch elsewhere if it were rid of a row, roughly.

    A row that is unlike all others takes a direction of its own, so that nothing of it is missed:
    its leverage is one. Without it the product has a direction for what it leaves out now.
    """
    found = []
    for part, (weight, _, _) in zip(parts, cases, strict=True):
        basis = part.up.double()
        basis = basis / basis.norm(dim=0).clamp_min(1e-300)
        left = max(min(weight.shape) - part.rank, 1)
        found.append(basis.square().sum(1) * part.error / left)
    return torch.stack(found).sum(0)


def _weighted(energies: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return energies if rows is None else energies * rows.double()


def _others(outs: int, rows: torch.Tensor) -> torch.Tensor:
    """The rows that are not among these, ascending."""
    left = torch.ones(outs, dtype=torch.bool, device=rows.device)
    left[rows] = False
    return left.nonzero().flatten()
