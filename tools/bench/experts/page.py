"""Writes the measured part of ``docs/merging_experts.md`` from ``results/experts_cpu.json``."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

__all__ = ["main", "measured"]

RESULTS: Final = Path(__file__).resolve().parents[1] / "results" / "experts_cpu.json"
PAGE: Final = Path(__file__).resolve().parents[3] / "docs" / "merging_experts.md"
MARK: Final = "<!-- Below: python -m torchlathe.tools.bench.experts.page; do not edit. -->\n"

INTRODUCTION = """\
## Measured

`python -m torchlathe.tools.bench.bench_experts --seeds {seeds}`, on {cpu}, {threads} thread, torch
{torch}. Nothing is trained after a rewrite. Two models of two Mixtral layers with 8 experts each,
2 per token, are trained in the benchmark, {seeds} times each:

- *text*: characters of Python's documentation (hidden size 64, {text_steps} steps); the last tenth
  of the text is for testing;
- *skills*: eight permutations of 24 symbols, the name of one at the head of each 8 tokens (hidden
  size 48, {skills_steps} steps). Four experts share their weights with the other four while they
  are trained, and the hidden units of the copies are shuffled afterwards. Their rows of the router
  begin near each other, and are trained freely.

Perplexity (per character, or per predictable token), geometric mean over the trainings, with each
of them in brackets; what is random is drawn {chances} times, of which the geometric mean counts.
Calibration: 16 batches of 16 x 128 tokens of the training data.
"""

ORDER = """\
### The published order

MC-SMoE reports that alignment, weighing by frequency and grouping by router logits each help; REAP
reports that pruning is ahead of merging. In how many of the cells (training, size) above the first
is ahead of the second, and the ratio of their perplexities (geometric mean):
"""

PIPELINES_TEXT = """\
### Merging, and then low rank plus sparse

The pipeline of MC-SMoE: `merge-experts`, and then `low-rank-split{{share=0.6,remainder=...}}` of
what the experts hold. *Merge to fewer* and *low rank alone* are of the same size, with one of the
two halves: the first merges to 0.6 times as many experts, the second splits all eight. Parameters
of the whole model are in per cent; perplexities are as above. MC-SMoE splits *after* merging
because it reports that merged experts have a lower stable rank (|W|_F^2 / |W|_2^2); here its mean
over the matrices of all experts is {before:.1f} before and {after:.1f} after merging to 0.6 times
as many.
"""

# (what is claimed to be ahead, of what)
_CLAIMS: Final = (
    ("merge (default)", "not aligned"),
    ("uniform weights", "not aligned, uniform weights"),
    ("merge (default)", "uniform weights"),
    ("uniform weights", "reversed weights"),
    ("balanced", "merge (default)"),
    ("merge (default)", "grouped by weights"),
    ("merge (default)", "grouped at random"),
    ("merge (default)", "clusters"),
    ("merge (default)", "uniform budgets"),
    ("prune (default)", "merge (default)"),
    ("prune as REAP", "merge (default)"),
    ("prune by outputs", "merge (default)"),
)


def measured(result: dict[str, Any]) -> str:
    """The part of the page below the mark.

    Args:
        result: The content of the result file.
    """
    from torchlathe.tools.bench.bench_experts import PIPELINES

    rows = [row for row in result["rows"] if row["method"] not in PIPELINES]
    ends = [row for row in result["rows"] if row["method"] in PIPELINES]
    steps = {f"{row['task']}_steps": row["steps"] for row in rows}
    chances = 1 + max(row["chance"] for row in rows)
    parts = [INTRODUCTION.format(**{**result, **steps, "chances": chances})]
    for task in sorted({row["task"] for row in rows}):
        parts += _task(task, [row for row in rows if row["task"] == task])
    parts += [ORDER, _order(rows)]
    if ends:
        parts += [PIPELINES_TEXT.format(**_stable_ranks(ends)), _pipelines(ends)]
    return "\n".join(parts)


def _losses(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, float, int], float]:
    """Loss by method, size and training; the mean over what was drawn by chance."""
    found: dict[tuple[str, float, int], list[float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["experts"], row["seed"]), []).append(row["loss"])
    return {key: statistics.mean(losses) for key, losses in found.items()}


def _task(task: str, rows: list[dict[str, Any]]) -> list[str]:
    sizes = sorted({row["experts"] for row in rows}, reverse=True)
    losses = _losses(rows)
    seeds = sorted({row["seed"] for row in rows})
    whole = [next(r["whole"] for r in rows if r["seed"] == seed) for seed in seeds]
    pairs = any(row["pairs"] is not None for row in rows)
    left = {size: _left(rows, size) for size in sizes}
    header = [f"{size:g} of 8 experts ({left[size]:.0%} of parameters)" for size in sizes]
    lines = [
        "| " + " | ".join(["", *header, *(["pairs found"] if pairs else [])]) + " |",
        "|" + " --- |" * (1 + len(header) + pairs),
        "| whole model | " + " | ".join([_cell(whole)] * len(sizes) + [""] * pairs) + " |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [_cell([losses[method, size, seed] for seed in seeds]) for size in sizes]
        if pairs:
            together = [r["pairs"] for r in rows if r["method"] == method]
            known = [share for share in together if share is not None]
            cells.append(f"{statistics.mean(known):.0%}" if known else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [f"### {task.capitalize()}\n", "\n".join(lines) + "\n"]


def _left(rows: list[dict[str, Any]], size: float) -> float:
    row = next(r for r in rows if r["experts"] == size and r["method"] == "merge (default)")
    return float(row["parameters"] / row["whole_parameters"])


def _cell(losses: list[float]) -> str:
    each = ", ".join(f"{math.exp(loss):.2f}" for loss in losses)
    return f"{math.exp(statistics.mean(losses)):.2f} ({each})"


def _stable_ranks(rows: list[dict[str, Any]]) -> dict[str, float]:
    merged = [row for row in rows if row["merged_stable_rank"] is not None]
    return {
        "before": statistics.mean(row["stable_rank"] for row in merged),
        "after": statistics.mean(row["merged_stable_rank"] for row in merged),
    }


def _pipelines(rows: list[dict[str, Any]]) -> str:
    cells: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["experts"]), []).append(row)
    keys = sorted(cells, key=lambda key: (key[0], -key[1]))
    header = [f"{task}, {size:g} of 8 experts" for task, size in keys]
    lines = ["| | " + " | ".join(header) + " |", "| --- |" + " --- |" * len(keys)]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = []
        for key in keys:
            mine = [row for row in cells[key] if row["method"] == method]
            left = statistics.mean(row["parameters"] / row["whole_parameters"] for row in mine)
            found.append(f"{_cell([row['loss'] for row in mine])}, {left:.0%}")
        lines.append(f"| {method} | " + " | ".join(found) + " |")
    return "\n".join(lines) + "\n"


def _order(rows: list[dict[str, Any]]) -> str:
    tasks = sorted({row["task"] for row in rows})
    lines = [
        "| first | second | " + " | ".join(tasks) + " |",
        "| --- | --- |" + " --- |" * len(tasks),
    ]
    for first, second in _CLAIMS:
        cells = []
        for task in tasks:
            losses = _losses(row for row in rows if row["task"] == task)
            keys = [key[1:] for key in losses if key[0] == first]
            gaps = [losses[(first, *key)] - losses[(second, *key)] for key in keys]
            ahead = sum(gap < 0 for gap in gaps)
            cells.append(f"{ahead} of {len(gaps)}, {math.exp(statistics.mean(gaps)):.2f}")
        lines.append(f"| {first} | {second} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the part of the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    head, _, _ = PAGE.read_text(encoding="utf-8").partition(MARK)
    PAGE.write_text(head + MARK + "\n" + measured(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
