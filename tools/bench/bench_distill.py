"""Distillation: small students of digits and of tabular data, by each method, with ablations.

Every row is kept in the result file as soon as it is there, and a call goes on with those that
are missing; ``--seconds`` says when to stop. ``--again`` measures a part anew. Needs torchmetrics.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from torchlathe.tools.bench.distilling.data import TASKS
from torchlathe.tools.bench.distilling.runs import ABLATIONS, METHODS, one_run, teacher_run
from torchlathe.tools.bench.resuming import go_on, rows_of

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
    result = rows_of(options.json, options.parts if options.again else ())
    go_on(options.json, result, _wanted(options.parts, options.seeds), options.seconds)
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
