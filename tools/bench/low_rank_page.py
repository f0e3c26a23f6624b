"""Writes the measured part of ``docs/low_rank.md`` from ``results/low_rank_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.bench_low_rank import RESULTS

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "low_rank.md"
MARK: Final = "<!-- measured -->\n"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.low_rank_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_low_rank` on {cpu}, {threads} thread, torch {torch}. Times
are CPU seconds of that thread, since other programs ran on the machine.
"""

QUALITY = """
### Agreement of MiniLM against size

The pretrained sentence encoder, with nothing trained after the split. Mean cosine of the embeddings
of 96 sentences of Python's documentation to those of the original; 256 others to calibrate with.
Columns are the share of the parameters of the 36 linear layers that is kept (embeddings stay).
"""

TIMES = """
### Time of one split

CPU seconds, and the ratio to one `torch.linalg.svd` of the same float32 matrix, in turn. *Half*
keeps half of the parameters; *low rank* is a sixteenth of the full rank, by the randomised method.
"""

SPEEDS = """
### Speed of a split layer

Time of the dense linear layer over that of its two factors ({modes}; above 1 is faster), float32,
by share of parameters kept and rows of the input.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(**result)]
    if rows := result.get("quality"):
        parts += [QUALITY, _quality(rows)]
    if rows := result.get("times"):
        parts += [TIMES, _times(rows)]
    if rows := result.get("speeds"):
        parts += [SPEEDS.format(modes=", ".join(_modes(rows))), _speeds(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _quality(rows: Sequence[dict[str, Any]]) -> str:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    cosines = {(row["contestant"], row["share"]): row["cosine"] for row in rows}
    best = {share: max(c for (_, s), c in cosines.items() if s == share) for share in shares}

    def cell(name: str, share: float) -> str:
        value = cosines.get((name, share))
        if value is None:
            return "-"
        return f"**{value:.3f}**" if value == best[share] else f"{value:.3f}"

    table = [[name, *(cell(name, share) for share in shares)] for name in names]
    return _table(["method, allocation", *(f"{share:.0%}" for share in shares)], table)


def _times(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        [
            "x".join(map(str, row["shape"])),
            row["case"] + (f", rank {row['rank']}" if "linalg" not in row["case"] else ""),
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return _table(["matrix", "what", "seconds", "ratio"], table)


def _modes(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [mode for mode in ("eager", "inductor") if all(mode in row for row in rows)]


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    modes = _modes(rows)
    counts = sorted({row["rows"] for row in rows})
    keys = list(dict.fromkeys((tuple(row["shape"]), row["share"], row["rank"]) for row in rows))
    found = {(tuple(r["shape"]), r["share"], r["rows"]): r for r in rows}
    table = []
    for shape, share, rank in keys:
        cells = (
            " / ".join(f"{found[shape, share, count][mode]:.2f}" for mode in modes)
            for count in counts
        )
        table.append(["x".join(map(str, shape)), f"{share:.0%}", str(rank), *cells])
    header = ["layer", "kept", "rank", *(f"{count} rows" for count in counts)]
    return _table(header, table)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; returns the exit status."""
    text = PAGE.read_text(encoding="utf-8")
    head, mark, _ = text.partition(MARK)
    if not mark:
        print(f"{PAGE} has no line {MARK.strip()}", file=sys.stderr)
        return 1
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_text(PAGE, head + mark + "\n" + measured(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
