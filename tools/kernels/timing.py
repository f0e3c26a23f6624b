"""Timing calls on a GPU: all copies in one CUDA graph, contestants in turn, medians.

Source: own; copies in turn as vLLM's kernel benchmarks do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Clock", "GraphClock", "Samples", "WallClock", "require_gpu", "time_in_turn"]


@dataclass(frozen=True)
class Samples:
    """Seconds of one call.

    Attributes:
        median: Half of the rounds took less.
        low: A fifth of the rounds took less.
        high: A fifth of the rounds took more.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Samples:
        """Quantiles of measurements."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(ordered[last // 2], ordered[round(0.2 * last)], ordered[round(0.8 * last)])


class Clock(Protocol):
    """Prepares calls, and times one run of them all."""

    def prepare(self, calls: Sequence[Callable[[], Tensor]]) -> Any:
        """What `seconds` takes."""

    def seconds(self, prepared: Any) -> float:
        """Seconds of one run of all calls."""


class GraphClock:
    """Captures the calls in a CUDA graph, and times its replay by events."""

    def prepare(self, calls: Sequence[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
        """Warm up on a side stream, as capturing asks for, and capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        del kept
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def seconds(self, prepared: torch.cuda.CUDAGraph) -> float:
        """Seconds of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        prepared.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


class WallClock:
    """Seconds by the clock on the wall, to try on a CPU what is meant for a GPU."""

    def prepare(self, calls: Sequence[Callable[[], Tensor]]) -> Sequence[Callable[[], Tensor]]:
        """Run the first."""
        calls[0]()
        return calls

    def seconds(self, prepared: Sequence[Callable[[], Tensor]]) -> float:
        """Seconds of one run of all calls."""
        start = time.perf_counter()
        for call in prepared:
            call()
        return time.perf_counter() - start


def time_in_turn(
    contestants: Mapping[str, Sequence[Callable[[], Tensor]]], clock: Clock, rounds: int = 40
) -> dict[str, Samples]:
    """Time contestants in turn in each round, so that a drifting clock hits all of them.

    Args:
        contestants: Calls of each, one for each copy of its data.
        clock: Takes the time.
        rounds: Measurements of each.

    Returns:
        Samples of one call of each.
    """
    prepared = {name: clock.prepare(calls) for name, calls in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, ready in prepared.items():
            seconds[name].append(clock.seconds(ready) / len(contestants[name]))
    return {name: Samples.of(values) for name, values in seconds.items()}


def require_gpu() -> torch.device:
    """The CUDA device.

    Raises:
        UnsupportedError: There is none, or no Triton.
    """
    from importlib.util import find_spec

    from torchlathe.ir.errors import UnsupportedError

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tuning and timing kernels need a CUDA device, and there is none",
            hint="`torchlathe kernels check` needs no GPU",
        )
    if find_spec("triton") is None:
        raise UnsupportedError("there is no Triton to run the kernels with", hint="install triton")
    return torch.device("cuda", torch.cuda.current_device())
