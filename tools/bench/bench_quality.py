"""Accuracy against size: each importance and allocation, with and without refitting.

Nets: a CNN and a vision transformer that are trained here on scikit-learn's digits, with
Torch-Pruning beside them at the same sizes, and a pretrained sentence encoder (MiniLM) on the
English of Python's documentation. Nothing is trained after the erase: what is measured is what
each method leaves. Source: own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console

from torchlathe.ir import Program, capture
from torchlathe.passes.importance import criterion_names
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.quality.contestants import Task, erase, scored
from torchlathe.tools.bench.quality.nets import NETS, accuracy, digits, trained
from torchlathe.tools.bench.quality.peer import PEERS, SCOPES, prune

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "quality_cpu.json"
SIZES: Final = (0.9, 0.7, 0.5, 0.3)
# Every importance globally; those that lead the field in every way that makes sense for them.
ALLOCATIONS: Final = {
    "l2": ("global", "local", "isomorphic"),
    "lamp": ("global", "isomorphic"),
    "taylor": ("global", "global/cost", "isomorphic"),
    "fisher": ("global", "global/cost", "isomorphic"),
    "wanda": ("global", "isomorphic"),
}
ENCODER_SIZES: Final = (0.9, 0.8, 0.7)
ENCODER_IMPORTANCE: Final = ("l2", "lamp", "wanda")
_SENTENCES: Final = 96


def digits_rows(name: str, seed: int, *, peer: bool) -> Iterator[dict[str, Any]]:
    """All curves of one net and seed, with or without Torch-Pruning's."""
    model, data = trained(name, seed), digits(seed)
    program = capture(model, (data.test[0][:64],))

    def metric(after: Program) -> float:
        return accuracy(after.run, data)

    task = Task(program, data.batches, _loss, metric)
    whole = metric(program)
    for importance in PEERS if peer else ():
        for scope in SCOPES:
            points = prune(model, data, importance, scope, SIZES)
            yield _row(name, seed, "torch-pruning", importance, scope, False, whole, points)
    for importance in criterion_names():
        criterion = scored(task, importance)
        for scope in ALLOCATIONS.get(importance, ("global",)):
            for refit, points in enumerate(erase(task, criterion, scope, SIZES)):
                yield _row(name, seed, "torchlathe", importance, scope, bool(refit), whole, points)


def _loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


def encoder_rows() -> Iterator[dict[str, Any]]:
    """The curves of the sentence encoder: feed-forward channels and heads are erased."""
    from scipy.stats import spearmanr

    from torchlathe.tools.demo_minilm import (
        embed,
        load_encoder,
        split_sentences,
    )

    encoder, tokenizer = load_encoder()
    calibration, test = split_sentences()
    test = test[:_SENTENCES]
    batches = [tokenizer(calibration[i : i + 16]) for i in range(0, len(calibration), 16)]
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(encoder, (), dict(batches[0]), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test)
    pairs = torch.triu_indices(len(test), len(test), offset=1)
    similar = (before @ before.T)[pairs[0], pairs[1]]
    cosines: list[float] = []

    def metric(after: Program) -> float:
        found = embed(after.run, tokenizer, test)
        cosines.append(float((before * found).sum(1).mean()))
        alike = (found @ found.T)[pairs[0], pairs[1]]
        return float(spearmanr(similar.numpy(), alike.numpy()).statistic)

    include = ("*.intermediate.dense.weight:0", "*.self.query.weight:0/0")
    task = Task(program, batches, None, metric, {"include": include})
    for importance in ENCODER_IMPORTANCE:
        criterion = scored(task, importance)
        cosines.clear()
        both = erase(task, criterion, "global", ENCODER_SIZES)
        for point, cosine in zip(_in_turn(*both), cosines, strict=True):
            point["cosine"] = cosine
        for refit, points in enumerate(both):
            yield _row("MiniLM", 0, "torchlathe", importance, "global", bool(refit), 1.0, points)


def _in_turn(*lists: list[dict[str, float]]) -> Iterator[dict[str, float]]:
    for together in zip(*lists, strict=True):
        yield from together


def _row(
    net: str,
    seed: int,
    who: str,
    importance: str,
    scope: str,
    refit: bool,
    whole: float,
    points: list[dict[str, float]],
) -> dict[str, Any]:
    return {
        "net": net,
        "seed": seed,
        "who": who,
        "importance": importance,
        "scope": scope,
        "refit": refit,
        "whole": whole,
        "points": points,
    }


def _measure(rows: Iterator[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        metrics = " ".join(f"{p['left']:.2f}:{p['metric']:.3f}" for p in row["points"])
        names = f"{row['net']} {row['seed']} {row['who']} {row['importance']} {row['scope']}"
        say(f"{names}{' refitted' if row['refit'] else ''}  {metrics}")
        found.append(row)
    return found


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", default="0,1,2", help="trainings of each net (default 0,1,2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nets", default=",".join((*NETS, "MiniLM")), help="names, by commas")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="torchlathe alone")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if unknown := set(options.nets.split(",")) - {*NETS, "MiniLM"}:
        parser.error(f"unknown nets {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure and write the JSON file; returns the exit status."""
    options = _arguments(argv)
    torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    start, processor = time.perf_counter(), time.process_time()
    rows: list[dict[str, Any]] = []

    def say(text: str) -> None:
        console.print(text, highlight=False)

    for net in options.nets.split(","):
        if net == "MiniLM":
            rows += _measure(encoder_rows(), say)
            continue
        for seed in map(int, options.seeds.split(",")):
            rows += _measure(digits_rows(net, seed, peer=options.peer), say)
    result = {
        "benchmark": "quality",
        **machine(),
        "seeds": options.seeds,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
