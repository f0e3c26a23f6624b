"""The benchmark of the kernels: correctness first, then latency against what one would use else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchlathe.kernels.tuning.table import tile_for
from torchlathe.tools.kernels.layers import LAYERS, Contest, Layer, dense, make_layer
from torchlathe.tools.kernels.timing import Clock, Samples, time_in_turn

__all__ = ["SHAPES", "TOKENS", "Ceilings", "Measurement", "bench", "error_of", "measure_ceilings"]

log = logging.getLogger("torchlathe")

# (output, input) features: a square layer that fits the L2 cache, one that does not, an MLP's.
SHAPES = ((4096, 4096), (8192, 8192), (14336, 4096))
TOKENS = (1, 8, 16, 32, 64, 256)

# Largest relative errors against float64; the sums are fp32, the results fp16 or bf16.
TOLERANCES = {"w4a16": 1e-3, "w8a16": 1e-3, "w8a8": 4e-3, "fp8": 4e-3, "w4a8": 4e-3}
# Others may sum in fp16.
_RIVAL_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured in the same process.

    Attributes:
        bytes_per_second: Read and written by a large copy.
        flops_per_second: Of a large bf16 product; twice that is taken for 8-bit types.
    """

    bytes_per_second: float
    flops_per_second: float

    def floor(self, moved: float, flops: float, integer: bool) -> float:
        """Seconds that a call takes at least."""
        rate = self.flops_per_second * (2 if integer else 1)
        return max(moved / self.bytes_per_second, flops / rate)


@dataclass(frozen=True)
class Measurement:
    """One op on one shape.

    Attributes:
        op: Name of the op.
        m: Tokens.
        n: Output features.
        k: Input features.
        group: Weights that share a scale.
        error: Relative to float64.
        correct: Whether that is within the tolerance.
        seconds: Samples by contestant: ``ours``, ``library``, ``fp16``, ``bf16``, and ``gemlite``
            where it is installed.
        floor: Seconds that the ceilings allow.
        tile: The tile that was used; None for the library's product.
        moved: Bytes that one call reads and writes.
        ceilings: Of the machine, in the same process.
    """

    op: str
    m: int
    n: int
    k: int
    group: int
    error: float
    correct: bool
    seconds: dict[str, Samples]
    floor: float
    tile: dict[str, int] | None
    moved: float = 0.0
    ceilings: Ceilings | None = None

    def ratio(self, other: str) -> float:
        """How many times faster ours is than another contestant."""
        return self.seconds[other].median / self.seconds["ours"].median

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the ratios."""
        others = [name for name in self.seconds if name != "ours"]
        ratios = {name: round(self.ratio(name), 3) for name in others}
        share = self.floor / self.seconds["ours"].median
        return asdict(self) | {"ratios": ratios, "share_of_floor": round(share, 3)}


def measure_ceilings(device: torch.device, clock: Clock) -> Ceilings:
    """Copy a gigabyte, and multiply random matrices (zeros would run faster)."""
    large = device.type == "cuda"
    source = torch.randn(2**28 if large else 2**16, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 64
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    found = time_in_turn(
        {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}, clock, 10
    )
    return Ceilings(2 * source.nbytes / found["copy"].median, 2 * size**3 / found["product"].median)


def error_of(layer: Layer) -> float:
    """Relative error of the op on the first copy, against float64."""
    wanted = layer.wanted()
    found = layer.ours.calls[0]().to(torch.float64)
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def bench(
    device: torch.device,
    clock: Clock,
    *,
    ops: Sequence[str] = tuple(LAYERS),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    rounds: int = 40,
    deadline: float | None = None,
    progress: Callable[[Measurement], None] | None = None,
) -> Iterator[Measurement]:
    """Measure ops on shapes, correctness first.

    Args:
        device: Where they run.
        clock: Takes the time.
        ops: Keys of `LAYERS`.
        shapes: (output, input) features.
        tokens: Numbers of tokens.
        rounds: Measurements of each contestant.
        deadline: By `time.monotonic`; what is not begun by then is left out.
        progress: Told of each measurement.

    Yields:
        A measurement for each op, shape and number of tokens.
    """
    ceilings = measure_ceilings(device, clock)
    for n, k in shapes:
        for m in tokens:
            if deadline is not None and time.monotonic() > deadline:
                return
            rivals = {
                "fp16": dense(m, n, k, torch.float16, device).calls,
                "bf16": dense(m, n, k, torch.bfloat16, device).calls,
            }
            for op in ops:
                layer = make_layer(op, m, n, k, device)
                found = _measure(layer, rivals, ceilings, clock, device, rounds)
                if progress is not None:
                    progress(found)
                yield found


def _right(layer: Layer) -> dict[str, Contest]:
    """The rivals whose result is that of the layer: what computes something else is no rival."""
    found = {}
    for name, contest in layer.rivals.items():
        try:
            wanted, other = layer.wanted(), contest.calls[0]().to(torch.float64)
            error = float((other - wanted).norm() / wanted.norm().clamp_min(1e-30))
        except Exception as failure:
            log.warning("%s fails on %s: %s", name, layer.problem.key, failure)
            continue
        if error <= _RIVAL_TOLERANCE:
            found[name] = contest
        else:
            log.warning("%s has an error of %.3g on %s", name, error, layer.problem.key)
    return found


def _measure(
    layer: Layer,
    rivals: dict[str, Any],
    ceilings: Ceilings,
    clock: Clock,
    device: torch.device,
    rounds: int,
) -> Measurement:
    problem = layer.problem
    error = error_of(layer)
    calls = {"ours": layer.ours.calls, "library": layer.library.calls, **rivals}
    calls |= {name: contest.calls for name, contest in _right(layer).items()}
    moved = layer.ours.size + problem.m * (problem.k * (1 if layer.integer else 2) + 2 * problem.n)
    tile = None if device.type == "cpu" else tile_for(problem, device)
    return Measurement(
        problem.op,
        problem.m,
        problem.n,
        problem.k,
        problem.group,
        error,
        error <= TOLERANCES[problem.op],
        time_in_turn(calls, clock, rounds),
        ceilings.floor(moved, 2.0 * problem.m * problem.n * problem.k, layer.integer),
        None if tile is None else asdict(tile),
        moved,
        ceilings,
    )
