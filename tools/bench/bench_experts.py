"""What merging and pruning experts cost: perplexity of small language models, with ablations.

Two models are trained here (`torchlathe.tools.bench.experts.models`): characters of English text,
and a task of skills of which each expert exists twice with its hidden units shuffled. Nothing is
trained after a rewrite. Source: the ablations of MC-SMoE (arXiv 2310.01334, section 4), own data.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe.ir import Program, capture
from torchlathe.passes import ExpertLayers, PassManager
from torchlathe.tools.bench.experts.models import Language, planted_skills, text_language
from torchlathe.tools.bench.machine import machine

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "experts_cpu.json"
_CHANCES: Final = 3  # seeds of what is random

# What is changed of merge-experts, by the name of the row.
MERGES: Final = {
    "merge (default)": "",
    "not aligned": "align=false",
    "balanced": "balance=true",
    "uniform weights": "weighting=uniform",
    "reversed weights": "weighting=reversed",
    "grouped by weights": "similarity=weight",
    "grouped at random": "similarity=random",
    "clusters": "grouping=clusters",
    "clusters by weights": "grouping=clusters,similarity=weight",
    "clusters by weights, uniform budgets": "grouping=clusters,similarity=weight,"
    "allocation=uniform",
    "uniform budgets": "allocation=uniform",
    "not aligned, uniform weights": "align=false,weighting=uniform",
}
PRUNES: Final = {
    "prune (default)": "",
    "prune by outputs": "by=outputs",
    "prune as REAP": "by=reap",
    "prune as REAP, uniform budgets": "by=reap,allocation=uniform",
    "prune, uniform budgets": "allocation=uniform",
}
# Merging and then low rank plus sparse, as MC-SMoE ends; {experts} are those that merging keeps.
_SPLIT: Final = "low-rank-split{{share=0.6,include=[*experts*]{rest}}}"
PIPELINES: Final = {
    "merge, low rank": "merge-experts{{experts={experts:g}}}," + _SPLIT.replace("{rest}", ""),
    "merge, low rank and 10 % of the rows": "merge-experts{{experts={experts:g}}},"
    + _SPLIT.replace("{rest}", ",remainder=0.1"),
    "merge, low rank and 25 % of the rows": "merge-experts{{experts={experts:g}}},"
    + _SPLIT.replace("{rest}", ",remainder=0.25"),
    "merge to fewer": "merge-experts{{experts={fewer:g}}}",
    "low rank alone": "low-rank-split{{params={params},include=[*experts*]}}",
    "low rank and 10 % of the rows alone": "low-rank-split{{params={params},remainder=0.1,"
    "include=[*experts*]}}",
}


def rows(
    language: Language, experts: float, only: AbstractSet[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Each method (or only some of them) at one size, with the loss that it leaves."""
    batch = language.calibration[0]
    program = capture(language.model, (), batch)
    for kind, methods in (("merge-experts", MERGES), ("prune-experts", PRUNES)):
        for name, options in methods.items():
            if only and name not in only:
                continue
            text = f"{kind}{{experts={experts:g}{',' if options else ''}{options}}}"
            chances = _CHANCES if "random" in options else 1
            for seed in range(chances):
                began = time.perf_counter()
                manager = PassManager(text, verify="off")
                after = manager.run(program, calibration=language.calibration, seed=seed)
                seconds = time.perf_counter() - began
                record = after.history[-1]
                yield {
                    "method": name,
                    "spec": text,
                    "chance": seed,
                    "experts": experts,
                    "loss": language.loss(after.run),
                    "seconds": seconds,
                    "parameters": record.parameters_after,
                    "per_layer": record.statistics["experts_per_layer"],
                    "pairs": _pairs(language, after),
                }
    yield from _pipelines(language, program, experts, only)


def _pipelines(
    language: Language, program: Program, experts: float, only: AbstractSet[str]
) -> Iterator[dict[str, Any]]:
    """Merging followed by low rank plus sparse, and each alone at the size of the first."""
    size = 0
    for name, form in PIPELINES.items():
        if only and name not in only and not (size == 0 and only & PIPELINES.keys()):
            continue
        text = form.format(experts=experts, fewer=0.6 * experts, params=size)
        began = time.perf_counter()
        manager = PassManager(text, verify="off")
        after = manager.run(program, calibration=language.calibration)
        seconds = time.perf_counter() - began
        size = size or after.history[-1].parameters_after
        yield {
            "method": name,
            "spec": text,
            "chance": 0,
            "experts": experts,
            "loss": language.loss(after.run),
            "seconds": seconds,
            "parameters": after.history[-1].parameters_after,
            "stable_rank": _stable_rank(program),
            "merged_stable_rank": _stable_rank(after) if name == "merge to fewer" else None,
            "pairs": None,
        }


def _stable_rank(program: Program) -> float:
    """Mean over all matrices of experts of ``|W|_F^2 / |W|_2^2``."""
    found = []
    for layer in program.analysis(ExpertLayers).layers:
        for name, axis in layer.tensors.items():
            for matrix in program.tensor(name).detach().movedim(axis, 0):
                if matrix.dim() == 2:
                    values = torch.linalg.svdvals(matrix)
                    found.append(float(values.square().sum() / values[0].square()))
    return sum(found) / len(found)


def _pairs(language: Language, program: Any) -> float | None:
    """Share of the planted pairs that ended up in one class, over all layers."""
    if not language.pairs:
        return None
    together = []
    for layer in program.analysis(ExpertLayers).layers:
        if layer.choices != 8:
            return None  # pruned
        slots = layer.slots(program)
        together += [bool(slots[a] == slots[b]) for a, b in language.pairs]
    return sum(together) / len(together)


def measure(
    make: Callable[[int, int, Path | None], Language],
    task: str,
    steps: int,
    seeds: int,
    sizes: tuple[float, ...],
    cache: Path | None,
    only: AbstractSet[str],
) -> Iterator[dict[str, Any]]:
    """All rows of one task."""
    for seed in range(seeds):
        language = make(seed, steps, cache)
        whole = language.loss(language.model)
        parameters = sum(p.numel() for p in language.model.parameters())
        head = {"task": task, "seed": seed, "steps": steps, "whole": whole}
        for experts in sizes:
            for row in rows(language, experts, only):
                yield {**head, "whole_parameters": parameters, **row}


def main(arguments: list[str] | None = None) -> int:
    """Run, and write the result file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each model")
    parser.add_argument("--steps", type=int, default=700, help="training steps on text")
    parser.add_argument("--cache", type=Path, help="folder to keep trained models in")
    parser.add_argument(
        "--only", nargs="*", default=[], help="methods to run; their rows replace those there are"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    found = []
    tasks = (
        ("skills", planted_skills, min(600, options.steps), (4.0,)),
        ("text", text_language, options.steps, (6.0, 4.0)),
    )
    for task, make, steps, sizes in tasks:
        only = set(options.only)
        for row in measure(make, task, steps, options.seeds, sizes, options.cache, only):
            found.append(row)
            console.print(
                f"{task} {row['seed']} {row['spec']}: {math.exp(row['loss']):.3f} "
                f"({math.exp(row['whole']):.3f} whole)"
            )
    if options.only:
        there = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
        found = [row for row in there if row["method"] not in options.only] + found
    order = [*MERGES, *PRUNES, *PIPELINES]
    found.sort(key=lambda row: order.index(row["method"]))
    result = {**machine(), "seeds": options.seeds, "rows": found}
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
