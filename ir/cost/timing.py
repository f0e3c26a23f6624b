"""Timing single calls of ops, on random data of their shapes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from torchlathe.ir.cost.calls import Call, Value

__all__ = ["Clock", "Timer", "call_on", "median", "samples"]

# Seconds that one call of the work takes; tests put one here that does not look at a clock.
Timer: TypeAlias = Callable[[Callable[[], object]], float]

_SHORTEST_SAMPLE = 100e-6  # seconds; shorter work is called several times for one sample
_MOST_CALLS = 50


class Clock:
    """The wall clock.

    Args:
        device: Where the work runs; waited for at both ends.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, work: Callable[[], object]) -> float:
        """Seconds per call of ``work``."""
        first = self._time(work, 1)
        calls = min(_MOST_CALLS, math.ceil(_SHORTEST_SAMPLE / max(first, 1e-9)))
        return first if calls <= 1 else self._time(work, calls)

    def _time(self, work: Callable[[], object], calls: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._wait()
        return (time.perf_counter() - start) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def samples(
    works: Sequence[Callable[[], object]], timer: Timer, *, rounds: int, cap: float
) -> list[list[float]]:
    """Time several works in turn (A, B, A, B, ...), so that drift of the machine hits all alike.

    The first round warms up and does not count.

    Args:
        works: What to time.
        timer: How.
        rounds: At most so many samples of each, at least one.
        cap: Seconds after which a work gets no further sample.

    Returns:
        Per work, seconds per call.
    """
    for work in works:
        timer(work)
    found: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, found, strict=True):
            if not taken or sum(taken) < cap:
                taken.append(timer(work))
    return found


def median(values: Sequence[float]) -> float:
    """The median of samples."""
    return statistics.median(values)


def call_on(call: Call, device: torch.device) -> Callable[[], object]:
    """The call as something to run, on data made up for it.

    Floating data is normal noise, integers are zero (which is a valid index into anything) and
    booleans are true.

    Args:
        call: With integer extents only.
        device: Where the tensors go.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def make(item: Any) -> Any:
        if isinstance(item, Value):
            return _tensor(item, device, generator)
        if isinstance(item, tuple):
            return tuple(map(make, item))
        return item

    args = [make(item) for item in call.args]
    kwargs = {name: make(item) for name, item in call.kwargs}
    target = call.target

    def work() -> object:
        return target(*args, **kwargs)

    return work


def _tensor(value: Value, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    shape = tuple(int(n) for n in value.shape)
    strides = tuple(int(n) for n in value.strides)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        dense = torch.randn(shape, generator=generator, device=device).to(value.dtype)
    elif value.dtype is torch.bool:
        dense = torch.ones(shape, dtype=value.dtype, device=device)
    else:
        dense = torch.zeros(shape, dtype=value.dtype, device=device)
    if len(strides) != len(shape) or dense.stride() == strides or not dense.numel():
        return dense
    return torch.empty_strided(shape, strides, dtype=value.dtype, device=device).copy_(dense)
