"""Means over seeds with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

__all__ = ["half_width", "interval"]


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; of at least two values."""
    from scipy.stats import t

    half: float = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return half


def interval(values: Sequence[float], digits: int = 1) -> str:
    """The mean and half of its 95 % interval; of one value itself alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {half_width(values):.{digits}f}"
