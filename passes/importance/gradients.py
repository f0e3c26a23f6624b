"""Criteria that estimate how the loss changes, from its gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from torchlathe.passes.analysis.families import Family, ParameterSlice
from torchlathe.passes.importance.criterion import Criterion, Scoring
from torchlathe.passes.statistics import stream_gradients

__all__ = ["Fisher", "Taylor"]


@dataclass(frozen=True)
class _GradientScored(Criterion):
    """A mean over batches of what a unit's weights and their gradients give.

    Attributes:
        over: Which slices: those that write a unit, which an erase zeroes, or all.
        per_sample: Take samples one by one.
    """

    comparable: ClassVar[bool] = True

    over: Literal["all", "writers"] = "all"
    per_sample: bool = False

    @abstractmethod
    def weigh(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What each element gives, to be summed over a unit."""

    def of_batch(self, sums: torch.Tensor) -> torch.Tensor:
        """The score of units in one batch, from the sums over them."""
        return sums

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """The mean over batches."""
        parts = _parts(scoring, self.over)
        total = {f: torch.zeros(f.extent, dtype=torch.float64) for f in scoring.chosen}
        count = 0
        names = {part.name for found in parts.values() for part in found}
        stream = stream_gradients(scoring.program, scoring.ctx, names, per_sample=self.per_sample)
        for gradients in stream:
            count += 1
            weighed = {n: self.weigh(scoring.tensor(n), g) for n, g in gradients.values.items()}
            sums = _Sums(weighed)
            for family, found in parts.items():
                total[family] += self.of_batch(_per_unit(scoring, family, found, sums))
        return {family: value / max(1, count) for family, value in total.items()}


@dataclass(frozen=True)
class Taylor(_GradientScored):
    """First-order change of the loss when a unit goes: ``|sum w g|`` over what it owns.

    The sum is signed within a batch and its magnitude is averaged over batches, since gradients
    of a trained model cancel over the whole data.

    Attributes:
        over: Which slices: "writers", which an erase zeroes; "all" counts a unit twice where it
            is written and read once, and is nearer to the sums of other libraries.
        per_sample: Take samples one by one; slower, and more exact where batches are large.

    Source: arXiv 1906.10771, equation 8, without the square; coupled slices are own.
    """

    name: ClassVar[str] = "taylor"

    def weigh(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``w g``."""
        return weight * gradient

    def of_batch(self, sums: torch.Tensor) -> torch.Tensor:
        """``|sum w g|``."""
        return sums.abs()


@dataclass(frozen=True)
class Fisher(_GradientScored):
    """Second-order change of the loss when a unit goes, by the diagonal empirical Fisher.

    The Hessian is taken to be ``E[g^2]`` on its diagonal, with g the gradient of a *batch*: for
    batches of n samples this is about 1/n of the Fisher of samples, for all parameters alike.

    Attributes:
        over: Which slices: "all" or the "writers".
        per_sample: Use the gradients of samples, one by one.

    Source: optimal brain damage (LeCun et al. 1990), saliency ``h w^2 / 2``, with the empirical
    Fisher as h (arXiv 1801.05787), summed over what a unit owns.
    """

    name: ClassVar[str] = "fisher"

    def weigh(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """``w^2 g^2 / 2``."""
        return (weight * gradient).square() / 2


def _parts(scoring: Scoring, over: str) -> dict[Family, list[ParameterSlice]]:
    return {
        family: [p for p in scoring.owned(family) if p.writes or over == "all"]
        for family in scoring.chosen
    }


class _Sums:
    """Sums over all axes but one, each taken once."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values
        self._found: dict[tuple[str, int], torch.Tensor] = {}

    def along(self, name: str, axis: int) -> torch.Tensor:
        """Shape (axis,), float64."""
        if (name, axis) not in self._found:
            value = self.values[name]
            others = [d for d in range(value.dim()) if d != axis]
            summed = value.sum(others, dtype=torch.float64) if others else value.double()
            self._found[name, axis] = summed
        return self._found[name, axis]


def _per_unit(
    scoring: Scoring, family: Family, parts: list[ParameterSlice], sums: _Sums
) -> torch.Tensor:
    total = torch.zeros(family.extent, dtype=torch.float64)
    for part in parts:
        # What the loss does not depend on has no gradient, and does not matter.
        if part.name in sums.values:
            total += scoring.per_unit(family, part, sums.along(part.name, part.axis))
    return total
