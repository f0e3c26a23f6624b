"""Writes the measured part of ``docs/low_rank.md`` from ``results/low_rank_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.bench_low_rank import RESULTS
from torchlathe.tools.bench.low_rank.quality import CONTESTANTS, HEAL
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "low_rank.md"

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
What is not said to be uniform is allocated; *tensor trains* and *Kronecker sums* stand alone with
dense.
"""

WHOLE = """
### The same, by the share of the whole model

`params=`: more than half of MiniLM is its embedding of words, which is split too.
"""

CHARACTERS = """
### Perplexity of a character model against size

A Llama of four layers, trained here on the text of `pydoc_data.topics`
(`torchlathe.tools.bench.character_model`); perplexity per character of text that it has not seen,
{dense:.3f} as it is. Columns as above, of its 29 linear layers.
"""

HEALED = """
### The character model before and after healing

The same perplexity before and after `{heal}`: every layer is refitted by
least squares, from the inputs that it has in the compressed model to the outputs that it had in the
original, on the same 16 batches.
"""

HEALED_MINILM = """
### MiniLM before and after healing

The mean cosine of the first table before and after `{heal}`, on the batches
that the splits are from; nothing is trained end to end.
"""

TIMES = """
### Time of one split

CPU seconds, and the ratio to one `torch.linalg.svd` of the same float32 matrix, in turn. *Half*
keeps half of the parameters; *low rank* is a sixteenth of the full rank, by the randomised method.
"""

SPEEDS = """
### Speed of a split layer

Time of the dense linear layer over that of its two factors (above 1 is faster), float32, at the
same number of threads, by share of parameters kept and rows of the input.
"""

MEMORY = """
### Peak memory of a split

By how much the anonymous memory of the process rose at its peak during a split to half of stacks of
equal layers of 1024 x 1024, less the factors that it made, in layers of float32 (second moments are
in memory-mapped files, `Calibration(..., limit_bytes=0)`). Work is in float64, on one layer;
most of it is the eigensolver's: the Gram matrix of the smaller side, and a workspace of twice that.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(**result)]
    quality = result.get("quality", [])
    if rows := [row for row in quality if not row.get("whole")]:
        parts += [QUALITY, _quality(rows, "cosine", max)]
    if rows := [row for row in quality if row.get("whole")]:
        parts += [WHOLE, _quality(rows, "cosine", max)]
    if rows := [row for row in result.get("characters", ()) if row["share"] < 1]:
        dense = next(r["perplexity"] for r in result["characters"] if r["share"] == 1)
        parts += [CHARACTERS.format(dense=dense), _quality(rows, "perplexity", min)]
    rows = result.get("healed", [])
    if rows:
        parts += [HEALED.format(heal=HEAL), _healed(rows, "perplexity")]
    rows = result.get("healed_minilm", [])
    if rows:
        parts += [HEALED_MINILM.format(heal=HEAL), _healed(rows, "cosine")]
    rows = result.get("times", [])
    if rows:
        parts += [TIMES, _times(rows)]
    rows = result.get("speeds", [])
    if rows:
        parts += [SPEEDS, _speeds(rows)]
    rows = result.get("memory", [])
    if rows:
        parts += [MEMORY, _memory(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _quality(
    rows: Sequence[dict[str, Any]], what: str, best_of: Callable[[Iterable[float]], float]
) -> str:
    """A line for each contestant; the best of each size is bold."""
    shares = sorted({row["share"] for row in rows}, reverse=True)
    order = {name: place for place, name in enumerate(CONTESTANTS)}
    names = dict.fromkeys(row["contestant"] for row in rows)
    values = {(row["contestant"], row["share"]): row[what] for row in rows}
    best = {share: best_of(v for (_, s), v in values.items() if s == share) for share in shares}

    def cell(name: str, share: float) -> str:
        value = values.get((name, share))
        if value is None:
            return "-"
        return f"**{value:.3f}**" if f"{value:.3f}" == f"{best[share]:.3f}" else f"{value:.3f}"

    listed = sorted(names, key=lambda name: order.get(name, len(order)))
    table = [[name, *(cell(name, share) for share in shares)] for name in listed]
    return markdown_table(["method", *(f"{share:.0%}" for share in shares)], table)


def _healed(rows: Sequence[dict[str, Any]], what: str) -> str:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    found = {
        (row["contestant"], row["share"]): f"{row['before']:.3f} → {row[what]:.3f}" for row in rows
    }
    names = dict.fromkeys(row["contestant"] for row in rows)
    table = [[name, *(found.get((name, share), "-") for share in shares)] for name in names]
    return markdown_table(["method", *(f"{share:.0%}" for share in shares)], table)


def _times(rows: Sequence[dict[str, Any]]) -> str:
    reference = {
        tuple(row["shape"]): row["seconds"] for row in rows if row["case"] == "torch.linalg.svd"
    }
    table = [
        [
            "x".join(map(str, row["shape"])),
            row["case"] + (f", rank {row['rank']}" if "linalg" not in row["case"] else ""),
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / reference[tuple(row['shape'])]:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["matrix", "what", "seconds", "ratio"], table)


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    counts = sorted({row["rows"] for row in rows})
    keys = list(dict.fromkeys((tuple(r["shape"]), r["share"], r["rank"], r["mode"]) for r in rows))
    found = {(tuple(r["shape"]), r["share"], r["mode"], r["rows"]): r["ratio"] for r in rows}
    table = []
    for shape, share, rank, mode in sorted(keys, key=lambda key: (key[0], -key[1], key[3])):
        cells = (f"{found[shape, share, mode, count]:.2f}" for count in counts)
        table.append(["x".join(map(str, shape)), f"{share:.0%}", str(rank), mode, *cells])
    header = ["layer", "kept", "rank", "backend", *(f"{count} rows" for count in counts)]
    return markdown_table(header, table)


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    depths = sorted({row["layers"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {
        (r["method"], r["layers"]): (r["peak_bytes"] - r["factors_bytes"]) / r["layer_bytes"]
        for r in rows
    }
    table = [[m, *(f"{found[m, depth]:.1f}" for depth in depths)] for m in methods]
    return markdown_table(["method", *(f"{depth} layers" for depth in depths)], table)


def main() -> int:
    """Write the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
