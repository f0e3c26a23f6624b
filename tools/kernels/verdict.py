"""What measurements say against the bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchlathe.tools.kernels.benching import Measurement

__all__ = ["Bar", "Finding", "bars_for", "findings", "summary"]


_SMALL = 4096 * 4096


@dataclass(frozen=True)
class Bar:
    """How many times faster than something an op must be.

    Attributes:
        other: The contestant that it is held to.
        least: The least ratio.
    """

    other: str
    least: float


@dataclass(frozen=True)
class Finding:
    """One measurement against one bar."""

    measurement: Measurement
    bar: Bar
    ratio: float

    @property
    def group(self) -> str:
        """The bar without sizes, which measurements are put together by."""
        found = self.measurement
        if self.bar.other != "fp16":
            return f"{found.op}: {self.bar.least}x {self.bar.other}"
        tokens = "M 1-16" if found.m <= 16 else f"M {found.m}"
        size = "fits the cache" if found.n * found.k <= _SMALL else "larger"
        return f"{found.op} {tokens}, {size}: {self.bar.least}x {self.bar.other}"

    @property
    def holds(self) -> bool:
        """Whether the bar is met and the result is right."""
        return self.measurement.correct and self.ratio >= self.bar.least

    def __str__(self) -> str:
        found = self.measurement
        word = "holds" if self.holds else "MISSED" if found.correct else "WRONG RESULT"
        return (
            f"{found.op} {found.n}x{found.k} M={found.m}: {self.ratio:.2f}x {self.bar.other}, "
            f"the bar is {self.bar.least}x: {word}"
        )


# Ratios to cuBLAS fp16 by op: up to 16 tokens where the weights are larger than the L2 cache, the
# same where they fit it (launches count there), and at 64 tokens.
_WEIGHT_ONLY = ("w4a16", "w8a16")
_RATIOS = {
    "w4a16": (2.4, 1.7, 1.3),
    "w4a8": (2.4, 1.7, 2.0),
    "w8a16": (1.6, 1.2, 1.0),
    "w8a8": (1.6, 1.2, 1.6),
    "fp8": (1.6, 1.2, 1.6),
}


def bars_for(found: Measurement) -> Iterator[Bar]:
    """The bars that a measurement is held to."""
    large, small, many = _RATIOS[found.op]
    if found.m <= 16:
        yield Bar("fp16", small if found.n * found.k <= _SMALL else large)
    elif found.m == 64 and found.n * found.k > _SMALL:
        yield Bar("fp16", many)
    elif found.m > 64 and found.op in _WEIGHT_ONLY:
        # Weights are unpacked for cuBLAS, which reads them once more.
        yield Bar("fp16", 0.85)
    if "gemlite" in found.seconds and found.m <= 16:
        yield Bar("gemlite", 1.5)
    # Never slower than what torch has, within the noise of a measurement.
    yield Bar("library", 0.95)


def findings(measurements: Iterable[Measurement]) -> list[Finding]:
    """Each measurement against each of its bars."""
    return [
        Finding(found, bar, found.ratio(bar.other))
        for found in measurements
        for bar in bars_for(found)
    ]


def summary(bars: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each bar, with the worst of what was held to it.

    Args:
        bars: ``bar``, ``ratio`` and ``holds`` of each measurement.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in bars:
        groups.setdefault(str(one["bar"]), []).append(one)
    return [
        f"{'holds ' if all(one['holds'] for one in found) else 'MISSED'} {bar}: "
        f"{min(one['ratio'] for one in found):.2f} at worst, "
        f"{sum(bool(one['holds']) for one in found)} of {len(found)}"
        for bar, found in groups.items()
    ]
