"""Writes the measured part of ``docs/heal.md`` from ``results/heal_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.bench_heal import RESULTS, SPLIT

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "heal.md"
MARK: Final = "<!-- measured -->\n"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.heal_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_heal` on {cpu}, {threads} thread, torch {torch}, after
`{split}`.
Times are CPU seconds of that thread, since other programs ran on the machine, and have everything
of `heal` in them: fitting, training, the original's answers, and evaluations. *Share* is how much
of what the split cost is back. Steps are few, so that this says what a minute buys, not where
healing ends.
"""

MODELS: Final = {
    "character model": (
        "Perplexity per character of 192 excerpts of text that no pass saw, by a decoder of four "
        "layers;\n48 batches of 8 excerpts of 64 characters to heal with, learning rate 0.001."
    ),
    "MiniLM": (
        "Mean cosine of the embeddings of 64 sentences that no pass saw to those of the original;\n"
        "192 sentences to heal with, learning rate 0.0001."
    ),
}


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(split=SPLIT, **result)]
    for case, about in MODELS.items():
        rows = [row for row in result["rows"] if row["case"] == case]
        if rows:
            parts += [f"\n### {case[0].upper()}{case[1:]}\n\n{about}\n", _table(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    known = {"case", "passes", "parameters", "seconds", "held_out"}
    what = next(name for name in rows[0] if name not in known)
    values = {row["passes"]: row[what] for row in rows}
    first, split = values.get("", 1.0), values.get(SPLIT)
    cells = []
    for row in rows:
        name = {"": "original", SPLIT: "split"}.get(row["passes"], f"`{row['passes']}`")
        back = ""
        if split is not None and row["passes"].startswith("heal"):
            back = f"{(row[what] - split) / (first - split):.0%}"
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        size = f"{row['parameters'] / 1e6:.2f} M"
        cells.append([name, size, f"{row[what]:.4f}", back, seconds])
    return "\n".join(
        _lines([["passes after the split", "parameters", what, "share", "CPU s"], *cells])
    )


def _lines(rows: Iterable[Sequence[str]]) -> Iterable[str]:
    for index, row in enumerate(rows):
        yield "| " + " | ".join(cell.replace("LR", "…") for cell in row) + " |"
        if not index:
            yield "|" + " --- |" * len(row)


def main() -> int:
    """Write the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8").partition(MARK)[0].rstrip("\n")
    write_text(PAGE, f"{page}\n\n{MARK}{measured(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
