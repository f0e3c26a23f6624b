"""Factorisations of the extents of a matrix into those of the sites of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import log, prod

__all__ = ["balanced_modes", "factorisations", "fits_structure"]


def balanced_modes(
    extent: int, sites: int, structure: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Factors of an extent, all above 1, as near to each other as they can be, in rising order.

    The same extent always gets the same factors, so that layers that share an axis cut it alike.

    Args:
        extent: To be written as a product.
        sites: How many factors.
        structure: How the axis is cut already (12 heads of 32), row-major. Factors whose cuts nest
            with these come first, since the two then have a common refinement and the axis can
            still be erased by its parts.

    Returns:
        The factors; None where the extent has too few prime factors.
    """
    ways = [way for way in factorisations(extent, sites) if min(way) > 1]
    if sites == 1:
        return (extent,)
    if not ways:
        return None
    nested = [way for way in ways if fits_structure(way, structure)] if prod(structure) > 1 else []
    return min(nested or ways, key=lambda way: (_spread(way), way))


def fits_structure(modes: Sequence[int], structure: Sequence[int]) -> bool:
    """Whether two row-major factorisations of an extent have a common refinement."""
    return all(a % b == 0 or b % a == 0 for a in _cuts(modes) for b in _cuts(structure))


@lru_cache(maxsize=4096)
def _divisors(extent: int) -> tuple[int, ...]:
    small = [d for d in range(1, int(extent**0.5) + 1) if extent % d == 0]
    return tuple(sorted({*small, *(extent // d for d in small)}))


def factorisations(extent: int, sites: int) -> Iterator[tuple[int, ...]]:
    """Every way to write an extent as an ordered product of so many factors, 1 included."""
    if sites == 1:
        yield (extent,)
        return
    for first in _divisors(extent):
        for rest in factorisations(extent // first, sites - 1):
            yield (first, *rest)


def _cuts(modes: Sequence[int]) -> list[int]:
    """Products of the trailing factors, without those at the ends."""
    return [prod(modes[k:]) for k in range(1, len(modes))]


def _spread(modes: Sequence[int]) -> float:
    """How far the factors are apart: the sum of their squared logarithms."""
    return round(sum(log(mode) ** 2 for mode in modes), 9)
