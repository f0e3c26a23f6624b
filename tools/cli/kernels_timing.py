"""``torchlathe kernels tune`` and ``torchlathe kernels bench``: what needs a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from torchlathe.tools.cli.parsing import Parser, UsageError, nearest

if TYPE_CHECKING:
    from torchlathe.tools.kernels.benching import Measurement

__all__ = ["add_bench", "add_tune", "run_bench", "run_tune"]

_OPS = ("w4a16", "w8a8", "fp8", "w8a16", "w4a8")

_TUNE = """\
examples:
  torchlathe kernels tune                                tune the usual shapes
  torchlathe kernels tune --op w4a16 --shape 11008x4096  tune one op for one shape

The fastest tiles go to a table in the cache directory (TORCHLATHE_CACHE), from which the ops
choose when they run.
"""

_BENCH = """\
examples:
  torchlathe kernels bench -o results.json
  torchlathe kernels bench --op w4a16 --shape 14336x4096 --tokens 1,16,64
  torchlathe kernels bench -o results.json --plots docs

Weights go around through more copies than the cache holds, all of them in one CUDA graph; cuBLAS
in fp16 and bf16, the library's way, and GemLite where it is installed, take turns with the op.
Errors are measured first.
"""


def add_tune(actions: Any, common: Parser) -> None:
    """Add ``tune`` to the parser."""
    parser: Parser = actions.add_parser(
        "tune",
        parents=[common],
        help="time tiles on this GPU, and keep the fastest",
        description="Time candidate tiles on this GPU, and keep the fastest of each problem.",
        epilog=_TUNE,
    )
    _add_problems(parser)
    parser.add_argument("--seconds", type=float, help="stop after this time (default: never)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run_tune, parser=parser)


def add_bench(actions: Any, common: Parser) -> None:
    """Add ``bench`` to the parser."""
    parser: Parser = actions.add_parser(
        "bench",
        parents=[common],
        help="time the ops on this GPU against cuBLAS and the library",
        description="Time the ops on this GPU against cuBLAS and against what torch has.",
        epilog=_BENCH,
    )
    _add_problems(parser)
    parser.add_argument(
        "--tokens", default="1,8,16,32,64,256", help="numbers of tokens (1,8,16,32,64,256)"
    )
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (40)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the JSON to a file too")
    parser.add_argument(
        "--plots", metavar="FOLDER", help="draw latency against tokens and the roofline there"
    )
    parser.set_defaults(run=run_bench, parser=parser)


def _add_problems(parser: Parser) -> None:
    parser.add_argument(
        "--op", action="append", metavar="OP", help=f"one of {', '.join(_OPS)}; may be repeated"
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="OUTxIN",
        help="features of the layer, as in 14336x4096; may be repeated",
    )


def run_tune(parsed: argparse.Namespace) -> int:
    """Tune on the GPU."""
    ops, shapes = _ops(parsed.op), _shapes(parsed.shape)

    import time

    import torch

    from torchlathe.kernels.tuning.table import TileTable
    from torchlathe.tools.kernels.benching import SHAPES
    from torchlathe.tools.kernels.timing import GraphClock, require_gpu
    from torchlathe.tools.kernels.tuning import tune

    device = require_gpu()
    import triton

    properties = torch.cuda.get_device_properties(device)
    table = TileTable(properties.name, triton.__version__)
    done = tune(
        device,
        GraphClock(),
        table,
        processors=properties.multi_processor_count,
        ops=ops,
        shapes=shapes or SHAPES,
        deadline=None if parsed.seconds is None else time.monotonic() + parsed.seconds,
        progress=lambda problem, tile, seconds: print(
            f"{problem.key}: {tile or 'the library'}, {seconds * 1e6:.1f} us", file=sys.stderr
        ),
    )
    if parsed.json:
        print(json.dumps(table.as_dict(), indent=1))
    else:
        print(f"{done} problems tuned, {len(table.entries)} in {table.path}")
    return 0


def run_bench(parsed: argparse.Namespace) -> int:
    """Time on the GPU; returns 1 if a result is wrong."""
    ops, shapes = _ops(parsed.op), _shapes(parsed.shape)
    tokens = [_whole(word, "--tokens") for word in parsed.tokens.split(",")]
    if parsed.rounds < 1:
        raise UsageError("--rounds must be at least 1")

    from torchlathe.tools.bench.machine import machine
    from torchlathe.tools.kernels.benching import SHAPES, bench
    from torchlathe.tools.kernels.timing import GraphClock, require_gpu

    device = require_gpu()
    rows = list(
        bench(
            device,
            GraphClock(),
            ops=ops,
            shapes=shapes or SHAPES,
            tokens=tokens,
            rounds=parsed.rounds,
        )
    )
    import torch

    name = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {"machine": machine(), "device": name}
    result["rows"] = [row.as_dict() for row in rows]
    if parsed.output:
        from torchlathe.ir.files import write_text

        write_text(parsed.output, json.dumps(result, indent=1) + "\n")
    if parsed.plots:
        from pathlib import Path

        from torchlathe.tools.kernels.plots import draw

        draw(result["rows"], Path(parsed.plots))
    if parsed.json:
        print(json.dumps(result, indent=1))
    else:
        print_rows(rows)
    return int(not all(row.correct for row in rows))


def print_rows(rows: list[Measurement]) -> None:
    """Print measurements as a table."""
    from torchlathe.tools.cli.console import output
    from torchlathe.tools.report_text import new_table

    rivals = ["fp16", "bf16", "library"]
    rivals += ["gemlite"] if any("gemlite" in row.seconds for row in rows) else []
    table = new_table(
        "*op", ">M", ">N", ">K", ">us", *(f">x {name}" for name in rivals), ">% floor", ">error"
    )
    for row in rows:
        ours = row.seconds["ours"].median
        table.add_row(
            row.op,
            *(str(extent) for extent in (row.m, row.n, row.k)),
            f"{ours * 1e6:.1f}",
            *(f"{row.ratio(name):.2f}" if name in row.seconds else "-" for name in rivals),
            f"{100 * row.floor / ours:.0f}",
            f"{row.error:.1e}" + ("" if row.correct else " WRONG"),
        )
    output().print(table)


def _ops(names: list[str] | None) -> tuple[str, ...]:
    for name in names or ():
        if name not in _OPS:
            raise UsageError(
                f"unknown op {name!r}", nearest(name, _OPS) or f"known are {', '.join(_OPS)}"
            )
    return tuple(names or _OPS)


def _shapes(texts: list[str] | None) -> list[tuple[int, int]]:
    found = []
    for text in texts or ():
        out, _, width = text.partition("x")
        found.append((_whole(out, "--shape"), _whole(width, "--shape")))
    return found


def _whole(text: str, option: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UsageError(f"{option} takes positive integers, not {text!r}")
    return int(text)
