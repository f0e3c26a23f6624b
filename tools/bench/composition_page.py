"""Writes the measured part of ``docs/composing.md``, and its plots, from the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.bench_composition import ALONE, PIPELINES, RESULTS
from torchlathe.tools.bench.drawing import svg
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "composing.md"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.composition_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_composition` on {cpu}, {threads} thread, torch {torch}.
Columns are the share of the bytes of the linear layers in fp32 that may stay; all else (embeddings,
norms) is as it was. In brackets what did stay. Nothing is trained.
"""
TEXTS: Final = {
    "characters": """
### A language model of characters

Perplexity per character of a Llama of four layers on text that it has not seen, {score:.3f} as it
is; eight batches of 16 excerpts to calibrate with. Less is better.

![perplexity against size](composing_characters.svg)
""",
    "minilm": """
### MiniLM

Mean cosine of the embeddings of 96 sentences to those of the original; 128 others to calibrate
with.

![agreement against size](composing_minilm.svg)
""",
}


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(**result)]
    for name, text in TEXTS.items():
        rows = [row for row in result["rows"] if row["model"] == name]
        ways = [row for row in rows if row["way"]]
        if not ways:
            continue
        whole = next(row["score"] for row in rows if not row["way"])
        parts += [text.format(score=whole), _table(ways), _verdict(ways, less=name == "characters")]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    found = {(row["way"], row["budget"]): row for row in rows}
    table = [[way, *(_cell(found.get((way, b))) for b in budgets)] for way in PIPELINES]
    return markdown_table(["way", *(f"{budget:.0%}" for budget in budgets)], table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["score"] is None:
        return "cannot be"
    return f"{row['score']:.3f} ({row['share']:.1%})"


def _verdict(rows: Sequence[dict[str, Any]], *, less: bool) -> str:
    """Where the best composition is better than the best alone, and where it is not."""
    lines = []
    for budget in sorted({row["budget"] for row in rows}, reverse=True):
        mine = [row for row in rows if row["budget"] == budget and row["score"] is not None]
        alone = [row for row in mine if row["way"] in ALONE]
        composed = [row for row in mine if row["way"] not in ALONE]
        if not alone or not composed:
            continue
        pick = min if less else max
        a, b = (pick(part, key=lambda row: row["score"]) for part in (alone, composed))
        better = b["score"] < a["score"] if less else b["score"] > a["score"]
        word = "is better than" if better else "is **not** better than"
        lines.append(
            f"- {budget:.0%}: *{b['way']}* ({b['score']:.3f}) {word} the best alone, *{a['way']}* "
            f"({a['score']:.3f})."
        )
    return "\n".join(lines) + "\n"


def _plot(name: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    with svg(path, 7, 4.2) as (axes,):
        for way in PIPELINES:
            points = sorted(
                (100 * r["share"], r["score"])
                for r in rows
                if r["way"] == way and r["score"] is not None
            )
            if points:
                line = "--" if way in ALONE else "-"
                axes.plot(*zip(*points, strict=True), line, marker="o", markersize=4, label=way)
        axes.set_xlabel("% of the bytes of the linear layers left")
        axes.set_ylabel("perplexity" if name == "characters" else "cosine")
        if name == "characters":
            axes.set_yscale("log")
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def main() -> int:
    """Write the page and its plots; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    for name in TEXTS:
        rows = [row for row in result["rows"] if row["model"] == name and row["way"]]
        if rows:
            _plot(name, rows, PAGE.with_name(f"composing_{name}.svg"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
