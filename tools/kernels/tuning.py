"""Times candidate tiles, and keeps the fastest of each problem in the table."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from torchlathe.kernels.semi_structured import op as semi_structured
from torchlathe.kernels.tuning import table as tables
from torchlathe.kernels.tuning.table import TileTable
from torchlathe.kernels.tuning.tiles import BUCKETS, Problem, Tile, candidates
from torchlathe.tools.kernels.benching import SHAPES, TOLERANCES, error_of
from torchlathe.tools.kernels.layers import LAYERS, make_layer
from torchlathe.tools.kernels.timing import Clock, time_in_turn

__all__ = ["tune", "tune_semi_structured"]

log = logging.getLogger("torchlathe")


def tune(
    device: torch.device,
    clock: Clock,
    table: TileTable,
    *,
    processors: int,
    ops: Sequence[str] = tuple(LAYERS),
    shapes: Sequence[tuple[int, int]] = SHAPES,
    buckets: Sequence[int] = BUCKETS,
    deadline: float | None = None,
    progress: Callable[[Problem, Tile | None, float], None] | None = None,
) -> int:
    """Time the candidates of each op, shape and bucket of tokens.

    A candidate that fails or computes something wrong is left out, with a warning. The library's
    product is one of the candidates, so that the choice is never slower than it.

    Args:
        device: Where they run.
        clock: Takes the time.
        table: Where the fastest go; it is saved after each problem.
        processors: Multiprocessors of the device.
        ops: Keys of `LAYERS`.
        shapes: (output, input) features.
        buckets: Numbers of tokens.
        deadline: By `time.monotonic`; what is not begun by then is left for another time.
        progress: Told each problem, its tile and its seconds.

    Returns:
        How many problems were tuned.
    """
    done = 0
    # The smallest products gain most, so that they come first if time is short.
    for m in buckets:
        for n, k in shapes:
            for op in ops:
                if deadline is not None and time.monotonic() > deadline:
                    return done
                tile, seconds = _tune_one(op, m, n, k, device, clock, table, processors)
                done += 1
                if progress is not None:
                    progress(make_problem(op, m, n, k), tile, seconds)
    return done


def tune_semi_structured(
    device: torch.device,
    clock: Clock,
    table: TileTable,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = (1024, 4096),
    progress: Callable[[Problem, Tile | None, float], None] | None = None,
) -> int:
    """Time the library's product with two zeros in each four weights against the dense one.

    Where it is wrong, fails, or is less than a twentieth faster, the table says dense.

    Returns:
        How many problems were timed; 0 where the library is not there.
    """
    done = 0
    for n, k in shapes:
        weight = torch.randn(n, k // 4, 4, device=device).half()
        weight[..., 2:] = 0
        weight = weight.flatten(1)
        compressed = semi_structured.compress(weight)
        if compressed is None:
            return done
        for m in tokens:
            x = torch.randn(m, k, device=device).half()
            problem = semi_structured.problem_of(x, weight)
            best: tuple[Tile | None, float] = (None, math.inf)
            try:
                best = _sparse_or_dense(x, weight, compressed, clock)
            except Exception as failure:
                log.warning("%s fails: %s", problem.key, failure)
            table.entries[problem.key] = best[0]
            table.save()
            done += 1
            if progress is not None:
                progress(problem, *best)
    return done


def _sparse_or_dense(
    x: torch.Tensor, weight: torch.Tensor, compressed: torch.Tensor, clock: Clock
) -> tuple[Tile | None, float]:
    def sparse() -> torch.Tensor:
        return semi_structured.sparse_product(x, compressed)

    def dense() -> torch.Tensor:
        return functional.linear(x, weight)

    wanted, found = dense().to(torch.float32), sparse().to(torch.float32)
    if not float((found - wanted).norm()) <= 2e-3 * float(wanted.norm()):
        raise ArithmeticError("the sparse product is another than the dense one")
    seconds = time_in_turn({"sparse": [sparse], "dense": [dense]}, clock, 20)
    faster = seconds["sparse"].median < 0.95 * seconds["dense"].median
    return (
        (semi_structured.SPARSE, seconds["sparse"].median)
        if faster
        else (None, seconds["dense"].median)
    )


def make_problem(op: str, m: int, n: int, k: int) -> Problem:
    """The problem of a layer as `make_layer` makes it."""
    kinds = {"w4a16": "float16", "w8a16": "float16", "fp8": "float8_e4m3fn"}
    return Problem(op, kinds.get(op, "int8"), m, n, k, 128 if op == "w4a16" else 0)


def _tune_one(
    op: str,
    m: int,
    n: int,
    k: int,
    device: torch.device,
    clock: Clock,
    table: TileTable,
    processors: int,
) -> tuple[Tile | None, float]:
    layer = make_layer(op, m, n, k, device)
    best: tuple[Tile | None, float] = (
        None,
        time_in_turn({"library": layer.library.calls}, clock, 10)["library"].median,
    )
    for tile in candidates(layer.problem, processors):
        # Through the table, so that what is timed is the op as it will run.
        table.entries[layer.problem.key] = tile
        with tables.using(table, processors):
            try:
                error = error_of(layer)
                if not error <= TOLERANCES[op]:
                    log.warning("%s with %s has an error of %.3g", layer.problem.key, tile, error)
                    continue
                seconds = time_in_turn({"ours": layer.ours.calls}, clock, 10)["ours"].median
            except Exception as failure:
                # Out of registers or shared memory: the candidate does not exist here.
                log.warning("%s with %s fails: %s", layer.problem.key, tile, failure)
                continue
        if seconds < best[1]:
            best = (tile, seconds)
    table.entries[layer.problem.key] = best[0]
    table.save()
    return best
