"""Writes the measured parts of ``docs/backends.md`` and ``docs/serving.md`` from ``results/``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.end_to_end.page import draw, end_to_end_part
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured", "serving_part"]

RESULTS: Final = Path(__file__).resolve().parent / "results"
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "backends.md"

HEAD = """## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.backends_page`; do not edit. -->
"""

AGREEMENT = """
### Agreement with the eager program

`python -m torchlathe.tools.bench.bench_backends` on {cpu}, torch {torch}: models of torchvision,
timm and transformers with random weights, captured static and dynamic, through each pipeline. A
cell is how many models agree of how many were tried, and the largest error of any; the check is
that of [What is checked](#what-is-checked). What does not agree is a named error, listed below.
"""

ADVICE = """
Of the models that `module` rebuilds, {count} cannot say in their own code all that was erased
(most take one width for the heads of queries, keys and values). The error names the families to
leave alone; with them in `exclude`, and the rest erased, these agree.
"""

OVERHEAD = """
### Compile time beyond the backend's own

`python -m torchlathe.tools.bench.bench_overhead` on {cpu}, torch {torch}, threads: {threads};
seconds of `torchlathe.compile` for a model of BERT-base's size through `{passes}`, with
`verify="{verify}"`, without what lowering to `{backend}` takes; a row for each run, in a process of
its own.

"""

ARTIFACT = """
### Loading an artefact

`python -m torchlathe.tools.bench.bench_artifact` on {cpu}, torch {torch}: seconds for an artefact
of {megabytes:.0f} MB whose file the system has in memory, a row for each process. Saved twice, its
bytes were {same}.

"""

SERVING = """## Measured

`python -m torchlathe.tools.serving --load-test` on {cpu}, torch {torch}: passes `{passes}`, backend
`{backend}`, {threads} thread of the server, {clients} clients on the same machine.

"""


def measured(results: Path = RESULTS) -> str:
    """The measured part of the page, of what result files there are."""
    parts = [HEAD]
    path = results / "backends_cpu.json"
    if path.exists():
        parts += _agreement(json.loads(path.read_text(encoding="utf-8")))
    path = results / "end_to_end_cpu.json"
    if path.exists():
        parts.append(end_to_end_part(json.loads(path.read_text(encoding="utf-8"))))
    path = results / "overhead_cpu.json"
    if path.exists():
        parts.append(_overhead(json.loads(path.read_text(encoding="utf-8"))))
    path = results / "artifact_cpu.json"
    if path.exists():
        parts.append(_artifact(json.loads(path.read_text(encoding="utf-8"))))
    return "".join(parts)


def _artifact(result: dict[str, Any]) -> str:
    text = ARTIFACT.format(
        **result["machine"],
        megabytes=result["bytes"] / 1e6,
        same="the same" if result["same_bytes"] else "not the same",
    )
    names = list(result["rows"][0])
    header = [name if name == "read" else f"`{name}`" for name in names]
    return text + markdown_table(
        header, [[f"{row[name]:.2f}" for name in names] for row in result["rows"]]
    )


def _overhead(result: dict[str, Any]) -> str:
    text = OVERHEAD.format(**{**result["machine"], **result})
    stages = [name for name in result["rows"][0]["stages"] if name != "lower"]
    cells = [
        [*(f"{row['stages'][stage]:.1f}" for stage in stages), f"{row['overhead']:.1f}"]
        for row in result["rows"]
    ]
    return text + markdown_table([*stages, "all"], cells)


def serving_part(results: Path = RESULTS) -> str:
    """The measured part of the page on serving; nothing if the load test was not run."""
    path = results / "serving_cpu.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for name, runs in result["rows"].items():
        for run in runs:
            shares = [f"{run[share]:.1f}" for share in ("p50", "p95", "p99")]
            numbers = [f"{run['requests']}", f"{run['failures']}", f"{run['per_second']:.1f}"]
            cells.append([name, *numbers, *shares])
    header = ["model", "requests", "failures", "per second", "p50 ms", "p95 ms", "p99 ms"]
    return SERVING.format(**{**result["machine"], **result}) + markdown_table(header, cells)


def _agreement(result: dict[str, Any]) -> list[str]:
    parts = [AGREEMENT.format(**result["machine"])]
    for passes, models in result["rows"].items():
        rows = [row for found in models.values() for row in found]
        if not rows:
            continue
        parts.append(f"\n**`{passes}`**\n")
        backends = dict.fromkeys(row["backend"] for row in rows)
        cells = [
            [f"`{name}`", *(_cell(rows, name, mode) for mode in ("static", "dynamic"))]
            for name in backends
        ]
        parts.append("\n" + markdown_table(["backend", "static", "dynamic"], cells))
        advised = {
            name
            for name, found in models.items()
            if any("excluded" in row and row["outcome"] == "agrees" for row in found)
        }
        if advised:
            parts.append(ADVICE.format(count=len(advised)))
        failed = [
            [name, row["mode"], f"`{row['backend']}`", row["outcome"], _clean(row.get("note", ""))]
            for name, found in models.items()
            for row in found
            if row["outcome"] != "agrees"
        ]
        if failed:
            header = ["model", "mode", "backend", "outcome", "message"]
            parts.append("\n" + markdown_table(header, failed))
    return parts


def _clean(note: str) -> str:
    """A message as a cell of a table."""
    return " ".join(note.split())[:160].replace("|", "/")


def _cell(rows: Sequence[dict[str, Any]], backend: str, mode: str) -> str:
    own = [row for row in rows if row["backend"] == backend and row["mode"] == mode]
    if not own:
        return "-"
    outcomes = Counter(row["outcome"] for row in own)
    worst = max((row["error"] for row in own if row["outcome"] == "agrees"), default=0.0)
    return f"{outcomes['agrees']} of {len(own)}, {worst:.1e}"


def main() -> int:
    """Write the part of the page after its mark, and the picture."""
    path = RESULTS / "end_to_end_cpu.json"
    if path.exists():
        draw(json.loads(path.read_text(encoding="utf-8")), PAGE.with_name("end_to_end.svg"))
    serving = rewrite_measured(PAGE.with_name("serving.md"), serving_part())
    return rewrite_measured(PAGE, measured()) or serving


if __name__ == "__main__":
    sys.exit(main())
