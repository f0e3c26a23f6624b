"""How far down a ladder to climb: until every limit holds, or to the rung that comes closest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchlathe.passes.analysis.families import Family
from torchlathe.passes.rewrite.allocation.ladders import Floors, Ladder

__all__ = ["Allocation", "Limit", "climb", "closest", "first_rung", "refill"]

_TRIES = 64  # units that are given back one by one, so that a large model takes no longer


@dataclass(frozen=True)
class Limit:
    """Something that must not be above a value.

    Attributes:
        name: Of the option that asks for it.
        most: The value.
        measure: What it is with these units kept, by atom number; it falls with the units.
    """

    name: str
    most: float
    measure: Callable[[Mapping[int, int]], float]

    def holds(self, kept: Mapping[int, int]) -> bool:
        """Whether the limit holds with these units kept."""
        return self.measure(kept) <= self.most


@dataclass(frozen=True)
class Allocation:
    """Units that each family keeps.

    Attributes:
        kept: Per family.
        rung: Of the ladder that it was found on.
        unmet: Limits that do not hold even at the last rung.
    """

    kept: Mapping[Family, int]
    rung: int
    unmet: tuple[Limit, ...] = ()

    @property
    def by_atom(self) -> dict[int, int]:
        """Counts by the number of the family's atom."""
        return {f.atom.number: k for f, k in self.kept.items()}


def first_rung(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first rung from ``low`` on at which something holds; ``high`` if it does at none."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def closest(ladder: Ladder, limit: Limit) -> Allocation:
    """The rung whose measure is nearest to the limit, on either side of it."""

    def measure(rung: int) -> float:
        return limit.measure(ladder.by_atom(ladder.kept(rung)))

    rung = first_rung(lambda r: measure(r) <= limit.most, 0, ladder.rungs)
    if rung > 0 and limit.most - measure(rung) > measure(rung - 1) - limit.most:
        rung -= 1
    kept = dict(zip(ladder.families, ladder.kept(rung), strict=True))
    return Allocation(kept, rung)


def climb(ladder: Ladder, limits: Sequence[Limit], floors: Floors) -> Allocation:
    """The most units with which all limits hold, to within one step of ``round_to`` units.

    The first rung at which they hold may take many units at once, as one of a local ladder does;
    those that need not go come back, in the order in which they were lost.
    """

    def holds(rung: int) -> bool:
        kept = ladder.by_atom(ladder.kept(rung))
        return all(limit.holds(kept) for limit in limits)

    rung = first_rung(holds, 0, ladder.rungs)
    counts = ladder.kept(rung)
    kept = ladder.by_atom(counts)
    unmet = tuple(limit for limit in limits if not limit.holds(kept))
    if rung and not unmet:
        counts = refill(ladder, rung, limits, floors)
    return Allocation(dict(zip(ladder.families, counts, strict=True)), rung, unmet)


def refill(ladder: Ladder, rung: int, limits: Sequence[Limit], floors: Floors) -> list[int]:
    """Counts at a rung, and of what it took from the one above as many units as limits allow."""
    counts, above = ladder.kept(rung), ladder.kept(rung - 1)
    dear = sorted(
        (i for i, (k, a) in enumerate(zip(counts, above, strict=True)) if a > k),
        key=lambda i: ladder.families[i].parameters_per_unit,
        reverse=True,
    )
    # One entry for each step of `round_to` units that could come back.
    steps = [i for i in dear for _ in range(-(-(above[i] - counts[i]) // floors.round_to))]
    if len(steps) <= 1:
        return counts  # this one step is what the limits need

    def with_steps(back: Sequence[int], start: Sequence[int]) -> list[int]:
        more = list(start)
        for i in back:
            more[i] = min(above[i], floors.rounded(more[i] + 1, ladder.families[i]))
        return more

    def holds(found: Sequence[int]) -> bool:
        kept = ladder.by_atom(found)
        return all(limit.holds(kept) for limit in limits)

    first = first_rung(lambda n: not holds(with_steps(steps[:n], counts)), 1, len(steps) + 1) - 1
    counts = with_steps(steps[:first], counts)
    # The next one breaks a limit, but cheaper ones may not.
    for i in steps[first + 1 :][:_TRIES]:
        more = with_steps([i], counts)
        if holds(more):
            counts = more
    return counts
