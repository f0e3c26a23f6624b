"""Writes the measured part of ``docs/backends.md`` from the JSON files under ``results/``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text
from torchlathe.tools.latency import quantile

__all__ = ["main", "measured"]

RESULTS: Final = Path(__file__).resolve().parent / "results"
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
MARK: Final = "<!-- measured -->\n"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.backends_page`; do not edit. -->
"""

AGREEMENT = """
### Agreement with the eager program

`python -m torchlathe.tools.bench.bench_backends` on {cpu}, torch {torch}: models of torchvision,
timm and transformers with random weights, captured static and dynamic, through `{passes}`. A cell
is how many models agree of how many were tried, and the largest error of any; the check is that of
[What is checked](#what-is-checked). What does not agree is a named error, listed below.
"""

END_TO_END = """
### End to end

`python -m torchlathe.tools.bench.bench_end_to_end` on {cpu}, torch {torch}: CPU milliseconds of a
call, median of interleaved rounds with {threads} thread, and speed against the original under the
inductor. Cosine is the least of any row, on inputs that no pass has seen. Weights are {weights}.
"""


def measured(results: Path = RESULTS) -> str:
    """The measured part of the page, of what result files there are."""
    parts = [HEAD]
    path = results / "backends_cpu.json"
    if path.exists():
        parts += _agreement(json.loads(path.read_text(encoding="utf-8")))
    path = results / "end_to_end_cpu.json"
    if path.exists():
        parts += _end_to_end(json.loads(path.read_text(encoding="utf-8")))
    return "".join(parts)


def _agreement(result: dict[str, Any]) -> list[str]:
    parts = []
    for passes, models in result["rows"].items():
        rows = [row for found in models.values() for row in found]
        if not rows:
            continue
        parts.append(AGREEMENT.format(passes=passes, **result["machine"]))
        backends = dict.fromkeys(row["backend"] for row in rows if row["backend"])
        table = [["backend", "static", "dynamic"]]
        for backend in backends:
            cells = [_cell(rows, backend, mode) for mode in ("static", "dynamic")]
            table.append([f"`{backend}`", *cells])
        parts.append(_table(table))
        failed = [
            [name, row["mode"], f"`{row['backend']}`", row["outcome"], row.get("note", "")]
            for name, found in models.items()
            for row in found
            if row["outcome"] != "agrees"
        ]
        if failed:
            clean = [[*row[:4], " ".join(row[4].split())[:160].replace("|", "/")] for row in failed]
            parts.append(_table([["model", "mode", "backend", "outcome", "message"], *clean]))
    return parts


def _cell(rows: Sequence[dict[str, Any]], backend: str, mode: str) -> str:
    own = [row for row in rows if row["backend"] == backend and row["mode"] == mode]
    if not own:
        return "-"
    outcomes = Counter(row["outcome"] for row in own)
    worst = max((row["error"] for row in own if row["outcome"] == "agrees"), default=0.0)
    return f"{outcomes['agrees']} of {len(own)}, {worst:.1e}"


def _end_to_end(result: dict[str, Any]) -> list[str]:
    parts: list[str] = []
    for name, case in result["cases"].items():
        if not parts:
            text = END_TO_END.format(
                **{**result["machine"], "threads": case["threads"]},
                weights="random unless the heading says otherwise",
            )
            parts.append(text)
        note = " (pretrained weights)" if case["weights"] == "pretrained" else ""
        parts.append(f"\n#### {name}{note}\n")
        base = next((r for r in case["rows"] if r["name"] == "original, inductor"), None)
        table = [["", "ms", "speed", "cosine"]]
        for row in case["rows"]:
            if "ms" not in row:
                problem = " ".join(row.get("problem", "").split())[:120].replace("|", "/")
                table.append([row["name"], "-", "-", problem])
                continue
            ratio = "-"
            if base is not None and "ms" in base:
                pairs = zip(base["ms"], row["ms"], strict=True)
                ratio = f"{quantile([a / b for a, b in pairs], 0.5):.2f}"
            table.append(
                [row["name"], f"{quantile(row['ms'], 0.5):.1f}", ratio, f"{row['cosine']:.4f}"]
            )
        parts.append(_table(table))
    return parts


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["", f"| {' | '.join(rows[0])} |", f"| {' | '.join('---' for _ in rows[0])} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows[1:]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the part of the page after its mark."""
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip("\n")
    write_text(PAGE, f"{text}\n\n{MARK}{measured()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
