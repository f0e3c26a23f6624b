"""Sparse training: quality against group sparsity, a planted unit, ResNet-18, and the overhead.

Every row is kept in the result file as soon as it is there, and a call goes on with those that
are missing; ``--seconds`` says when to stop. ``--again`` measures a part anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from torchlathe.tools.bench.resuming import go_on, rows_of
from torchlathe.tools.bench.sparse_training.contestants import METHODS, one_run
from torchlathe.tools.bench.sparse_training.overhead import overhead
from torchlathe.tools.bench.sparse_training.peer import PEER, torch_pruning
from torchlathe.tools.bench.sparse_training.planted import planted
from torchlathe.tools.bench.sparse_training.resnet import evenly, resnet18
from torchlathe.tools.bench.sparse_training.tasks import TASKS

__all__ = ["ABLATED", "ABLATION", "RESULTS", "SPARSITIES", "main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "sparse_training_cpu.json"
SEEDS: Final = 5
# In the order in which they are measured.
SPARSITIES: Final = {
    "digits CNN": (0.7, 0.5, 0.9, 0.3),
    "digits ViT": (0.7, 0.5),
    "characters": (0.5, 0.3),
}
# Options of HESSO beside its defaults, which are measured with all methods.
ABLATED: Final = ("digits CNN", "HESSO", 0.7)
ABLATION: Final[dict[str, dict[str, Any]]] = {
    "cosine the other way": {"saliency": {**dict.fromkeys(
        ("magnitude", "average", "cosine", "taylor1", "taylor2"), 0.2), "cosine_sign": -1}},
    "families may shrink to one unit": {"keep_at_least": 1},
    "one period": {"periods": 1},
    "magnitude alone": {"saliency": "magnitude"},
    "average magnitude alone": {"saliency": "average"},
    "Taylor alone": {"saliency": "taylor1"},
    "cosine alone": {"saliency": "cosine"},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=["small", "ablation", *TASKS])
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after so many")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the result file")
    parser.add_argument("--again", action="store_true", help="forget what these parts have")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = rows_of(options.json, options.parts if options.again else ())
    result["rows"] = {k: v for k, v in result["rows"].items() if _is_current(k, v, options.parts)}
    go_on(options.json, result, _wanted(options.parts, options.seeds), options.seconds)
    return 0


def _is_current(key: str, row: dict[str, Any], parts: Sequence[str]) -> bool:
    """Whether a row, where its part is asked for, is of as many steps as its task has now."""
    task = key.split("|")[0]
    return task not in TASKS or task not in parts or row.get("steps") == TASKS[task](0).steps


def _wanted(parts: Sequence[str], seeds: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Keys of the rows, and what measures them; one sparsity, then one seed after the other."""
    if "small" in parts:
        yield "small|overhead", overhead
        for floor in (None, 1):
            yield f"small|resnet18|{floor}", partial(resnet18, floor)
        yield "small|resnet18|evenly", evenly
        for seed in range(seeds):
            yield f"small|planted|{seed}", partial(planted, seed)
    tasks = [name for name in TASKS if name in parts]
    for place in range(max(map(len, SPARSITIES.values()))):
        for seed in range(seeds):
            for task in tasks:
                yield from _of_task(task, SPARSITIES[task][place : place + 1], seed)
            if "ablation" in parts and not place:
                for name, more in ABLATION.items():
                    run = partial(_row, *ABLATED, seed, **more)
                    yield f"ablation|{name}|{seed}", run


def _of_task(
    task: str, sparsities: Sequence[float], seed: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    for sparsity in sparsities:
        yield f"{task}|dense|0|{seed}", partial(_row, task, "dense", 0.0, seed)
        for method in [m for m in METHODS if m != "dense"]:
            yield f"{task}|{method}|{sparsity}|{seed}", partial(_row, task, method, sparsity, seed)
        yield f"{task}|{PEER}|{sparsity}|{seed}", partial(_peer, task, sparsity, seed)


def _peer(task: str, sparsity: float, seed: int) -> dict[str, Any]:
    return vars(torch_pruning(TASKS[task](seed), sparsity, seed))


def _row(task: str, method: str, sparsity: float, seed: int, **more: Any) -> dict[str, Any]:
    return vars(one_run(TASKS[task](seed), method, sparsity, seed, **more))


if __name__ == "__main__":
    sys.exit(main())
