"""Traces from samples, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["TraceEstimate", "rademacher"]


@dataclass(frozen=True)
class TraceEstimate:
    """A trace as far as random samples tell it.

    Attributes:
        value: The estimate.
        standard_error: Of it. With two probes or more per batch it is that of the probes on these
            batches; with one, the spread between batches is in it too, so that it is too large
            rather than too small. NaN for a single sample.
        samples: How many there were.
    """

    value: float
    standard_error: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[Sequence[float]]) -> TraceEstimate:
        """From the samples of each batch that has any; the trace is the mean over them.

        Source: Hutchinson 1990 (the estimate).
        """
        means = [sum(batch) / len(batch) for batch in samples]
        value = sum(means) / len(means)
        count = sum(len(batch) for batch in samples)
        if all(len(batch) > 1 for batch in samples):
            variance = sum(_variance(batch) / len(batch) for batch in samples) / len(means) ** 2
        elif count > 1:
            variance = _variance([x for batch in samples for x in batch]) / count
        else:
            variance = math.nan
        return cls(value, math.sqrt(variance), count)

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.1g}"


def rademacher(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Signs, each as likely, in the shape and dtype of a tensor; the generator is the CPU's."""
    # A byte of random bits each, eight at a time: several times faster than drawing floats.
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(generator=generator)
    bits = words.view(torch.int8)[:count].bitwise_and_(1)
    return bits.to(like.dtype).mul_(2).sub_(1).reshape(like.shape).to(like.device)


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / (len(values) - 1)
