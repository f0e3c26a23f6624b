"""Correctness, tuning, the table and a verdict on a GPU, in one call of under ten minutes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from torchlathe.ir.errors import Error
from torchlathe.ir.files import write_text
from torchlathe.kernels.tuning.table import TileTable, forget
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.kernels.benching import (
    TOLERANCES,
    Measurement,
    bench,
    error_of,
    measure_ceilings,
)
from torchlathe.tools.kernels.extras import Extra, measure_extras
from torchlathe.tools.kernels.further import FURTHER
from torchlathe.tools.kernels.layers import LAYERS, make_layer
from torchlathe.tools.kernels.timing import Clock, GraphClock, require_gpu
from torchlathe.tools.kernels.tuning import tune, tune_semi_structured
from torchlathe.tools.kernels.verdict import Finding, findings

__all__ = ["check", "correctness", "main"]

# Tokens and features that no tile divides, and more tokens than any tile takes.
_EDGES = (
    (1, 257, 384),
    (2, 256, 512),
    (7, 1000, 768),
    (17, 300, 4096),
    (63, 128, 200),
    (65, 96, 640),
)


# What the other ops are held to: each is another kernel to compile.
_FEWER_EDGES = ((1, 257, 384), (7, 1000, 768), (17, 300, 4096), (65, 96, 640))
Edges = Sequence[tuple[int, int, int]]


def correctness(
    device: torch.device, edges: Edges = _EDGES, fewer: Edges = _FEWER_EDGES
) -> list[dict[str, Any]]:
    """Each op on shapes at the edges, (tokens, output, input features), against float64."""
    rows = []
    for op in LAYERS:
        for m, n, k in edges:
            error = error_of(make_layer(op, m, n, k, device))
            good = error <= TOLERANCES[op]
            rows.append({"op": op, "m": m, "n": n, "k": k, "error": error, "correct": good})
    for op, build in FURTHER.items():
        for m, n, k in fewer:
            case = build(m, n, k, device)
            error = case.error()
            good = error <= case.tolerance
            rows.append({"op": op, "m": m, "n": n, "k": k, "error": error, "correct": good})
    return rows


def check(
    device: torch.device, clock: Clock, table: TileTable, processors: int, **options: Any
) -> dict[str, Any]:
    """Run everything.

    Args:
        device: Where it runs.
        clock: Takes the time.
        table: Where tiles go.
        processors: Multiprocessors of the device.
        **options: ``seconds`` of all (540), ``shapes`` and ``tokens`` as `bench` takes them,
            ``scale`` as `measure_extras` takes it, and ``edges`` of all ops.

    Returns:
        All results, for JSON, with ``verdict``: lines, and ``good``: whether all is right.
    """
    start = time.monotonic()
    seconds = float(options.pop("seconds", 540.0))
    scale = int(options.pop("scale", 1))
    _say("correctness")
    chosen = options.pop("edges", None)
    edges = correctness(device) if chosen is None else correctness(device, chosen, chosen)
    for row in edges:
        if not row["correct"]:
            _say(f"  WRONG: {row}")
    _say(f"tuning, for at most {0.4 * seconds:.0f} s")
    shapes = {key: value for key, value in options.items() if key == "shapes"}
    tuned = tune(
        device,
        clock,
        table,
        processors=processors,
        deadline=start + 0.4 * seconds,
        progress=lambda problem, tile, took: _say(f"  {problem.key}: {tile} {took * 1e6:.1f} us"),
        **shapes,
    )
    tuned += tune_semi_structured(
        device,
        clock,
        table,
        progress=lambda problem, tile, took: _say(
            f"  {problem.key}: {'dense' if tile is None else 'sparse'} {took * 1e6:.1f} us"
        ),
        **shapes,
    )
    forget()
    _say("timing")
    measured = list(
        bench(device, clock, deadline=start + 0.75 * seconds, progress=_show, **options)
    )
    ceilings = measure_ceilings(device, clock)
    extras: list[Extra] = []
    for extra in measure_extras(
        device, clock, ceilings, scale=scale, deadline=start + 0.95 * seconds
    ):
        _say(f"  {extra}")
        extras.append(extra)
    found: list[Finding | Extra] = [*findings(measured), *extras]
    verdict = [str(finding) for finding in found]
    good = all(row["correct"] for row in edges) and all(finding.holds for finding in found)
    return {
        "machine": machine(),
        "device": table.device,
        "triton": table.triton,
        "correctness": edges,
        "tuned": tuned,
        "tiles": table.as_dict()["entries"],
        "measurements": [row.as_dict() for row in measured],
        "extras": [asdict(extra) for extra in extras],
        "verdict": verdict,
        "missed": [str(finding) for finding in found if not finding.holds],
        "good": good,
        "seconds": time.monotonic() - start,
    }


def _show(row: Measurement) -> None:
    us = {name: f"{samples.median * 1e6:.1f}" for name, samples in row.seconds.items()}
    word = "" if row.correct else " WRONG"
    _say(f"  {row.op} {row.n}x{row.k} M={row.m}: {us} us, error {row.error:.2g}{word}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run on the GPU of this machine; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/gpu_check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it (540)")
    parser.add_argument("-o", "--output", default="gpu_check.json", help="where the JSON goes")
    parsed = parser.parse_args(argv)
    try:
        device = require_gpu()
    except Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    import triton

    properties = torch.cuda.get_device_properties(device)
    table = TileTable(properties.name, triton.__version__)
    result = check(
        device, GraphClock(), table, properties.multi_processor_count, seconds=parsed.seconds
    )
    write_text(parsed.output, json.dumps(result, indent=1) + "\n")
    held = len(result["verdict"]) - len(result["missed"])
    for line in result["missed"]:
        _say(line)
    _say(
        f"{held} of {len(result['verdict'])} bars hold, {result['tuned']} problems tuned, "
        f"{result['seconds']:.0f} s; all of it is in {parsed.output}"
    )
    return int(not result["good"])


if __name__ == "__main__":
    sys.exit(main())
