"""Which units go first: ladders from a whole program down to one at its floors.

A ladder says, for each of its rungs, how many units every family keeps; within a family the
lowest scores go first. How far down to climb is for `allocation.climbing` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from torchlathe.passes.analysis.families import Family

__all__ = [
    "Floors",
    "Ladder",
    "Scores",
    "global_ladder",
    "isomorphic_ladder",
    "kept_by_share",
    "local_ladder",
    "lowest",
]

# Per family, float64 of shape (extent,); higher stays, infinite always.
Scores = Mapping[Family, torch.Tensor]


@dataclass(frozen=True)
class Floors:
    """The fewest units that a family may keep.

    Attributes:
        keep_at_least: A count, or a share of the units if below 1.
        round_to: Kept counts are multiples of it, where the family is large enough.
    """

    keep_at_least: float = 1
    round_to: int = 1

    def of(self, family: Family, score: torch.Tensor | None = None) -> int:
        """The fewest units of a family that may stay.

        Args:
            family: The family.
            score: Units with an infinite score always stay.
        """
        least = self.keep_at_least
        count = int(least) if least >= 1 else math.ceil(least * family.extent)
        infinite = 0 if score is None else int(score.isposinf().sum())
        return self.rounded(max(1, count, infinite), family)

    def rounded(self, kept: int, family: Family) -> int:
        """The next multiple of ``round_to`` from here, or all units."""
        return min(family.extent, math.ceil(kept / self.round_to) * self.round_to)


@dataclass(frozen=True)
class Ladder:
    """From all units kept, at rung 0, to every family at its floor.

    Attributes:
        families: The families that lose units.
        rungs: The number of the last rung.
        kept: Units that each of the families keeps at a rung; no count grows on the way down.
    """

    families: tuple[Family, ...]
    rungs: int
    kept: Callable[[int], list[int]]

    def by_atom(self, kept: Sequence[int]) -> dict[int, int]:
        """Counts of the families by the number of their atom."""
        return {f.atom.number: k for f, k in zip(self.families, kept, strict=True)}


def lowest(score: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices of the units that are not among the ``kept`` best; shape (extent - kept,)."""
    return torch.argsort(score, stable=True)[: len(score) - kept]


def global_ladder(
    scores: Scores,
    floors: Floors,
    *,
    normalise: bool = True,
    costs: Mapping[Family, float] | None = None,
) -> Ladder:
    """Rank the units of all families in one list; each rung takes one unit.

    Args:
        scores: Of the families.
        floors: The fewest units to keep.
        normalise: Divide scores by their family's mean, so that families of different scale
            compare; not for scores that compare as they are.
        costs: What a unit of each family saves; scores are divided by it.
    """
    families = tuple(scores)
    values = _values(scores, normalise=normalise, costs=costs)
    return _ranked(families, [values], [list(range(len(families)))], scores, floors)


def isomorphic_ladder(
    scores: Scores,
    groups: Sequence[Sequence[Family]],
    floors: Floors,
    *,
    normalise: bool = True,
    costs: Mapping[Family, float] | None = None,
) -> Ladder:
    """Rank units within groups of families alike; each rung takes the same share of each group.

    Args:
        scores: Of the families.
        groups: Which of them are alike.
        floors: The fewest units to keep.
        normalise: As in `global_ladder`. Families alike may differ in width, and the scale of
            weights follows the width.
        costs: As in `global_ladder`.

    Source: arXiv 2407.04616; dividing by the mean first as Torch-Pruning does it.
    """
    families = tuple(scores)
    place = {family: i for i, family in enumerate(families)}
    members = [[place[family] for family in group] for group in groups]
    values = [
        _values({f: scores[f] for f in group}, normalise=normalise, costs=costs) for group in groups
    ]
    return _ranked(families, values, members, scores, floors)


def local_ladder(scores: Scores, floors: Floors) -> Ladder:
    """Each rung takes the same share of the units of each family."""
    families = tuple(scores)
    rungs = max((f.extent for f in families), default=0)
    least = [floors.of(f, s) for f, s in scores.items()]

    def kept(rung: int) -> list[int]:
        return [
            floors.rounded(max(floor, round(f.extent * (1 - rung / rungs))), f)
            for f, floor in zip(families, least, strict=True)
        ]

    return Ladder(families, rungs, kept)


def kept_by_share(
    scores: Scores, shares: Mapping[Family, float], floors: Floors
) -> dict[Family, int]:
    """Units to keep where a given share of each family goes."""
    return {
        f: floors.rounded(max(floors.of(f, score), round(f.extent * (1 - shares[f]))), f)
        for f, score in scores.items()
    }


def _values(
    scores: Scores, *, normalise: bool, costs: Mapping[Family, float] | None
) -> list[torch.Tensor]:
    """Scores as they are ranked."""
    values = []
    for family, score in scores.items():
        value = score / _scale(score) if normalise else score
        values.append(value if costs is None else value / costs[family])
    return values


def _scale(score: torch.Tensor) -> torch.Tensor:
    """Mean magnitude; infinite scores are for units that must stay, and do not count."""
    finite = score[score.isfinite()].abs()
    return finite.mean().clamp_min(1e-30) if len(finite) else torch.ones(())


def _ranked(
    families: tuple[Family, ...],
    values: Sequence[Sequence[torch.Tensor]],
    members: Sequence[Sequence[int]],
    scores: Scores,
    floors: Floors,
) -> Ladder:
    """A ladder over groups of families, each with its own ranking.

    Args:
        families: All of them.
        values: Per group and member, what its units are ranked by.
        members: Per group, which of the families are in it.
        scores: By which the units of a family go.
        floors: The fewest units to keep.
    """
    least = [floors.of(f, scores[f]) for f in families]
    orders = [
        _order(own, group, [families[i].extent - least[i] for i in group])
        for own, group in zip(values, members, strict=True)
    ]
    sizes = [sum(families[i].extent for i in group) for group in members]
    rungs = max(sizes, default=0)

    def kept(rung: int) -> list[int]:
        counts = [family.extent for family in families]
        for order, size in zip(orders, sizes, strict=True):
            taken = order[: round(size * rung / max(rungs, 1))]
            gone = torch.bincount(taken, minlength=len(families))
            for i, count in enumerate(gone.tolist()):
                counts[i] -= count
        return [floors.rounded(k, f) for k, f in zip(counts, families, strict=True)]

    return Ladder(families, rungs, kept)


def _order(
    values: Sequence[torch.Tensor], members: Sequence[int], removable: Sequence[int]
) -> torch.Tensor:
    """The owners of the units that may go, in the order in which they go; shape (units,)."""
    if not values:
        return torch.zeros(0, dtype=torch.int64)
    may_go = [torch.sort(v, stable=True).values[:n] for v, n in zip(values, removable, strict=True)]
    owners = [torch.full((len(v),), i) for i, v in zip(members, may_go, strict=True)]
    return torch.cat(owners)[torch.argsort(torch.cat(may_go), stable=True)]
