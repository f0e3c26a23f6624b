"""How long two callables take, measured side by side.

The two are called in turn (A, B, A, B, ...), so that a machine that slows down or speeds up
meanwhile does so for both, and each round gives one ratio that such drift hardly touches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Latency", "compare_latency"]

_MIN_SAMPLE_SECONDS = 0.5e-3  # below this, one sample times several calls
_MAX_CALLS = 200
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """Times of the original and of the compiled model.

    Attributes:
        original_ms: One sample per round; milliseconds per call.
        compiled_ms: The same for the compiled model; sample *i* was taken right after sample *i*
            of the original.
        threads: Intra-op threads of torch while measuring.
        device: Type of the device that the inputs are on.
        inputs: ``float32[2, 16]`` for each tensor input.
    """

    original_ms: tuple[float, ...]
    compiled_ms: tuple[float, ...]
    threads: int
    device: str
    inputs: tuple[str, ...]

    @property
    def original_median(self) -> float:
        """Median of the original, milliseconds per call."""
        return quantile(self.original_ms, 0.5)

    @property
    def compiled_median(self) -> float:
        """Median of the compiled model, milliseconds per call."""
        return quantile(self.compiled_ms, 0.5)

    @property
    def speedup(self) -> float:
        """Ratio of the medians, original over compiled: above 1 the compiled model is faster."""
        return self.original_median / self.compiled_median

    @property
    def paired_speedup(self) -> float:
        """Median of the ratios that the rounds gave; robust against drift of the machine."""
        pairs = zip(self.original_ms, self.compiled_ms, strict=True)
        return quantile([a / b for a, b in pairs], 0.5)

    def to_dict(self) -> dict[str, Any]:
        """Samples, and for readers of the JSON also what follows from them."""
        return {
            "original_ms": list(self.original_ms),
            "compiled_ms": list(self.compiled_ms),
            "threads": self.threads,
            "device": self.device,
            "inputs": list(self.inputs),
            "summary": {
                "original_ms": _summary(self.original_ms),
                "compiled_ms": _summary(self.compiled_ms),
                "speedup": self.speedup,
                "paired_speedup": self.paired_speedup,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """The inverse of `to_dict`."""
        return cls(
            tuple(data["original_ms"]),
            tuple(data["compiled_ms"]),
            int(data["threads"]),
            str(data["device"]),
            tuple(data["inputs"]),
        )


def compare_latency(
    original: Callable[..., Any],
    compiled: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    rounds: int = 50,
    budget_seconds: float = 2.0,
) -> Latency:
    """Call both in turn under ``torch.inference_mode`` and take their times.

    Args:
        original: Called as ``original(*args, **kwargs)``.
        compiled: Called with the same.
        args: Positional arguments.
        kwargs: Keyword arguments.
        rounds: At most so many samples of each.
        budget_seconds: Stop after so much time. The first call of each, in which a backend may
            still compile, does not count. Slow models may take three times as long, to have five
            rounds; one round is always taken.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kwargs = dict(kwargs or {})
    flat, spec = pytree.tree_flatten((tuple(args), kwargs))
    leaves = [x for x in flat if isinstance(x, torch.Tensor)]
    device = next((x.device for x in leaves if x.device.type != "cpu"), torch.device("cpu"))

    def sample(function: Callable[..., Any], calls: int) -> float:
        # Containers of its own for each call: a model may grow a cache that it is given.
        own = [pytree.tree_unflatten(flat, spec) for _ in range(calls)]
        _synchronize(device)
        start = time.perf_counter()
        for positional, named in own:
            function(*positional, **named)
        _synchronize(device)
        return (time.perf_counter() - start) / calls

    first: list[float] = []
    second: list[float] = []
    with torch.inference_mode():
        sample(original, 1)
        sample(compiled, 1)
        start = time.perf_counter()
        pair = (sample(original, 1), sample(compiled, 1))
        calls = min(_MAX_CALLS, max(1, math.ceil(_MIN_SAMPLE_SECONDS / max(min(pair), 1e-9))))
        end = start + max(budget_seconds, min(3 * budget_seconds, (_LEAST_ROUNDS + 1) * sum(pair)))
        while len(first) < rounds and (not first or time.perf_counter() < end):
            first.append(sample(original, calls) * 1e3)
            second.append(sample(compiled, calls) * 1e3)
    return Latency(
        tuple(first),
        tuple(second),
        torch.get_num_threads(),
        device.type,
        tuple(tensor_text(x) for x in leaves),
    )


def tensor_text(tensor: torch.Tensor) -> str:
    """Dtype and shape as in ``float32[2, 16]``."""
    shape = ", ".join(str(extent) for extent in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]"


def quantile(values: Sequence[float], share: float) -> float:
    """The quantile of a non-empty sequence, interpolated linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {f"p{round(share * 100)}": quantile(values, share) for share in (0.2, 0.5, 0.8)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
