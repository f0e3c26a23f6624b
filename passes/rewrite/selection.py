"""Which units to erase, to reach a share of the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from torchlathe.ir import Program, TensorKind
from torchlathe.ir.axes import AxisMap, Concat, Product, Term
from torchlathe.passes.analysis.families import Families, Family

__all__ = ["Sizes", "floor_of", "select_by_share", "select_global", "select_local"]


@dataclass(frozen=True)
class _Parameter:
    numel: int
    axes: tuple[Term, ...]


class Sizes:
    """Counts parameters after erasing, from extents alone."""

    def __init__(self, program: Program, families: Families, chosen: tuple[Family, ...]) -> None:
        axis_map: AxisMap = families.axis_map
        nodes = program.tensor_nodes
        owned = {s.name for f in chosen for s in f.slices}
        self._parameters = [
            _Parameter(entry.tensor.numel(), axis_map.terms(nodes[name]))
            for name, entry in program.entries.items()
            if entry.kind is TensorKind.PARAMETER and name in owned
        ]
        self.prunable = sum(p.numel for p in self._parameters)

    def remaining(self, kept: Mapping[int, int]) -> int:
        """Parameters left of those on a chosen family.

        Args:
            kept: Units left, by atom number.
        """
        cache: dict[int, int] = {}

        def extent(term: Term) -> int:
            known = cache.get(id(term))
            if known is None:
                if isinstance(term, Product):
                    known = math.prod(extent(f) for f in term.factors)
                elif isinstance(term, Concat):
                    known = sum(extent(p) for p in term.pieces)
                else:
                    known = kept.get(term.number, term.extent)
                cache[id(term)] = known
            return known

        return sum(math.prod(extent(t) for t in p.axes) for p in self._parameters)


def floor_of(family: Family, keep_at_least: float, round_to: int) -> int:
    """The fewest units that may stay: at least one, and a multiple of ``round_to`` if it can be.

    Args:
        family: The family.
        keep_at_least: A count, or a share of the units if below 1.
        round_to: Kept counts are multiples of it.
    """
    count = keep_at_least if keep_at_least >= 1 else math.ceil(keep_at_least * family.extent)
    return _round_up(max(1, int(count)), family.extent, round_to)


def _round_up(kept: int, extent: int, round_to: int) -> int:
    return min(extent, math.ceil(kept / round_to) * round_to)


def _lowest(score: torch.Tensor, kept: int) -> torch.Tensor:
    """Indices of the units that are not among the ``kept`` best."""
    order = torch.argsort(score, stable=True)
    return order[: len(score) - kept]


def select_global(
    sizes: Sizes,
    scores: Mapping[Family, torch.Tensor],
    share: float,
    *,
    keep_at_least: float,
    round_to: int,
) -> dict[Family, torch.Tensor]:
    """Erase the units that score lowest over all families, until the share is reached.

    Scores are divided by their family's mean, so that families of different scale compare.
    """
    families = list(scores)
    normalised = [s / _scale(s) for s in scores.values()]
    values = torch.cat(normalised)
    owners = torch.cat([torch.full((len(s),), i) for i, s in enumerate(normalised)])
    owners = owners[torch.argsort(values, stable=True)]
    floors = [floor_of(f, keep_at_least, round_to) for f in families]

    def kept_after(count: int) -> list[int]:
        gone = torch.bincount(owners[:count], minlength=len(families)).tolist()
        return [
            _round_up(max(floor, f.extent - g), f.extent, round_to)
            for f, g, floor in zip(families, gone, floors, strict=True)
        ]

    kept = _bisect(sizes, families, share, kept_after, len(owners))
    return {f: _lowest(s, k) for (f, s), k in zip(scores.items(), kept, strict=True)}


def _scale(score: torch.Tensor) -> torch.Tensor:
    """Mean magnitude; infinite scores are for units that must stay, and do not count."""
    finite = score[score.isfinite()].abs()
    return finite.mean().clamp_min(1e-30) if len(finite) else torch.ones(())


def select_local(
    sizes: Sizes,
    scores: Mapping[Family, torch.Tensor],
    share: float,
    *,
    keep_at_least: float,
    round_to: int,
) -> dict[Family, torch.Tensor]:
    """Erase the same share of each family's units, until the share of parameters is reached."""
    families = list(scores)
    steps = max((f.extent for f in families), default=1)

    def kept_after(count: int) -> list[int]:
        return [
            _round_up(
                max(floor_of(f, keep_at_least, round_to), round(f.extent * (1 - count / steps))),
                f.extent,
                round_to,
            )
            for f in families
        ]

    kept = _bisect(sizes, families, share, kept_after, steps)
    return {f: _lowest(s, k) for (f, s), k in zip(scores.items(), kept, strict=True)}


def select_by_share(
    scores: Mapping[Family, torch.Tensor],
    shares: Mapping[Family, float],
    *,
    keep_at_least: float,
    round_to: int,
) -> dict[Family, torch.Tensor]:
    """Erase a given share of the units of each family."""
    found = {}
    for family, score in scores.items():
        kept = round(family.extent * (1 - shares[family]))
        kept = max(kept, floor_of(family, keep_at_least, round_to))
        found[family] = _lowest(score, _round_up(kept, family.extent, round_to))
    return found


def _bisect(
    sizes: Sizes,
    families: list[Family],
    share: float,
    kept_after: Callable[[int], list[int]],
    most: int,
) -> list[int]:
    """Counts of kept units whose parameters come closest to the target."""
    target = sizes.prunable * (1 - share)

    def remaining(count: int) -> int:
        kept = kept_after(count)
        return sizes.remaining({f.atom.number: k for f, k in zip(families, kept, strict=True)})

    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if remaining(middle) <= target:
            high = middle
        else:
            low = middle + 1
    if low > 0 and target - remaining(low) > remaining(low - 1) - target:
        low -= 1
    return kept_after(low)
