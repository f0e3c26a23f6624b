"""Distillation: small students of digits and of tabular data, by each method, with ablations.

Every row is kept in the result file as soon as it is there, and a call goes on with those that
are missing; ``--seconds`` says when to stop. ``--again`` measures a part anew. Needs torchmetrics.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.distilling.data import TASKS
from torchlathe.tools.bench.distilling.runs import ABLATIONS, METHODS, one_run, teacher_run
from torchlathe.tools.bench.machine import machine

__all__ = ["RESULTS", "SEEDS", "main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "distill_cpu.json"
SEEDS: Final = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["methods", "ablations"])
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after so many")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the result file")
    parser.add_argument("--again", action="store_true", help="forget what these parts have")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    console, start = Console(stderr=True), time.monotonic()
    result = json.loads(options.json.read_text()) if options.json.exists() else {"rows": {}}
    if options.again:
        result["rows"] = {
            k: v for k, v in result["rows"].items() if k.split("|")[0] not in options.parts
        }
    result |= machine()
    for key, run in _wanted(options.parts, options.seeds):
        if key in result["rows"]:
            continue
        if time.monotonic() - start > options.seconds:
            console.print("there is more to measure")
            return 0
        before = time.monotonic()
        result["rows"][key] = run()
        console.print(f"{key}: {result['rows'][key]} ({time.monotonic() - before:.0f} s)")
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def _wanted(parts: Sequence[str], seeds: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Keys of the rows, and what measures them: what takes little time first, seed by seed."""
    for part in (list(TASKS)[1:], list(TASKS)[:1]):
        for seed in range(seeds):
            for task in part if "methods" in parts else ():
                yield f"methods|{task}|teacher|{seed}", partial(teacher_run, task, seed)
                for name, method in METHODS.items():
                    yield f"methods|{task}|{name}|{seed}", partial(one_run, task, method, seed)
        for seed in range(seeds):
            for title, (task, methods) in ABLATIONS.items() if "ablations" in parts else ():
                for name, method in methods.items():
                    if task in part and method not in METHODS.values():
                        key = f"ablations|{title}|{name}|{seed}"
                        yield key, partial(one_run, task, method, seed)


if __name__ == "__main__":
    sys.exit(main())
