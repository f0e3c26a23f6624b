"""Writes ``docs/benchmarks.md`` and ``docs/coverage.md`` from the JSON files under ``results/``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from torchlathe.tools.bench.coverage.page import coverage_page

__all__ = ["benchmarks_page", "main"]

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
COVERAGE_PAGE = PAGE.with_name("coverage.md")

INTRODUCTION = """\
# Benchmarks

<!-- Written by `python -m torchlathe.tools.bench.pages` from tools/bench/results; do not edit. -->

Each table was measured in one run on one machine, both contestants in turn in each round. The
files that it comes from, with quantiles and versions, are in `tools/bench/results`.
"""

ERASE = """\
## Dependency analysis and structured erase

`python -m torchlathe.tools.bench.bench_erase --threads 1 --coverage`, against Torch-Pruning 1.6
(`MagnitudePruner`, ratio 0.5) on {cpu}, {threads} thread, torch {torch}, commit {commit}.
Seconds, median of {rounds} rounds. A ratio of 0.5 means half of the *channels* to Torch-Pruning
and half of the *parameters* to `structured-erase`, so that Torch-Pruning leaves fewer.
*Analysis* finds the families after the capture; *total* is analysis and erase; *managed* is the
same by the pass manager, and *verified* with the check in float64 against the zeroed twin. The
last column is total to Torch-Pruning's graph and prune.
"""

MEMORY = """\
### Peak memory of `compile`

MiB. *Rewrites* is what capture and passes add at their peak to the loaded model, *compile* the same
with the float64 check and the measuring run of model and result, whose activations count too (one
forward pass of the original in float32 takes what its column says). The ratios are the model plus
that to the weights before plus the weights after.
"""

COVERAGE = """\
### Small models, with no hints

What each does with a model when it is told nothing about it; torchlathe's time has capture and
verifying in it.
"""


def benchmarks_page(results: Path = RESULTS) -> str:
    """The page as text.

    Raises:
        FileNotFoundError: A result file is missing.
    """
    erase = json.loads((results / "erase_cpu.json").read_text(encoding="utf-8"))
    return "\n".join([INTRODUCTION, *_erase(erase)])


def _erase(result: dict[str, Any]) -> list[str]:
    steps = ("capture", "analysis", "total", "managed", "verified")
    header = ["model", "parameters", "left", "left by TP", *steps, "TP", "ratio"]
    rows = []
    for case in result["cases"]:
        left = case["peer_parameters_after"]
        rows.append(
            [
                case["case"],
                _millions(case["parameters"]),
                _millions(case["parameters_after"]),
                _millions(left) if left else "-",
                *(f"{case[f'{step}_s']['p50']:.3f}" for step in steps),
                f"{case['peer_s']['p50']:.3f}" if case["peer_ok"] else "fails",
                f"{case['ratio']:.2f}" if case["peer_ok"] else "-",
            ]
        )
    parts = [ERASE.format(**result), _table(header, rows)]
    measured = [case for case in result["cases"] if "memory" in case]
    if measured:
        keys = ("model", "erased", "forward", "rewrites", "compile")
        header = ["model", "weights", "erased weights", "one forward pass", "rewrites", "compile"]
        header += ["ratio of rewrites", "ratio of compile"]
        rows = [
            [
                case["case"],
                *(f"{case['memory'][f'{key}_bytes'] / 2**20:.0f}" for key in keys),
                f"{case['memory']['rewrites_ratio']:.2f}",
                f"{case['memory']['ratio']:.2f}",
            ]
            for case in measured
        ]
        parts += [MEMORY, _table(header, rows)]
    if result.get("coverage"):
        rows = [
            [row["case"], _outcome(row["torchlathe"]), _outcome(row["torch_pruning"])]
            for row in result["coverage"]
        ]
        parts += [COVERAGE, _table(["model", "torchlathe", "Torch-Pruning"], rows)]
    return parts


def _outcome(attempt: dict[str, Any]) -> str:
    if attempt["outcome"] == "ok":
        share = attempt["parameters_after"] / attempt["parameters"]
        return f"{share:.0%} left, {attempt['seconds']:.2f} s"
    return str(attempt["outcome"]) + (f": {attempt['error']}" if "error" in attempt else "")


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the pages; returns the exit status."""
    covered = json.loads((RESULTS / "coverage_cpu.json").read_text(encoding="utf-8"))
    COVERAGE_PAGE.write_text(coverage_page(covered), encoding="utf-8")
    PAGE.write_text(benchmarks_page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
