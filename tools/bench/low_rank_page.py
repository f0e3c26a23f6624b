"""Writes the measured part of ``docs/low_rank.md`` from ``results/low_rank_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.bench_low_rank import RESULTS
from torchlathe.tools.bench.low_rank.memory import REFERENCE
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

The same perplexity before and after `{heal}` on the same 16 batches: every
layer that can be is refitted by least squares to the outputs that it had in the original, then all
parameters are trained end to end, for as many steps after each method.
"""

HEALED_MINILM = """
### MiniLM before and after healing

The mean cosine of the first table before and after `{heal}`, on the batches
that the splits are from, for as many steps after each method.
"""

CLOSED_FORM = """
The same after `{heal}` alone, with nothing trained end to end:
"""

TIMES = """
### Time of one split

CPU seconds, and the ratio to one `torch.linalg.svd` of the same float32 matrix, in turn. *Half*
keeps half of the parameters; *low rank* is a sixteenth of the full rank, by the randomised method;
*tensor train* has two sites, and is fitted to data but in *tensor train, svd*.
"""

SPEEDS = """
### Speed of a split layer

Time of the dense linear layer over that of its two factors (above 1 is faster), float32, at the
same number of threads, by share of parameters kept and rows of the input.
"""

MEMORY = """
### Peak memory of a split

By how much the anonymous memory of the process rose at its peak during a split to half of stacks of
equal layers, less the factors that it made, in layers of float32 (second moments are in
memory-mapped files, `Calibration(..., limit_bytes=0)`; where the extents differ, layers take turns
with their transposes). Beside it what `torch.linalg.svd` of one such layer takes, U, S and V among
it. A split works in float64 on one layer: the Gram matrix of the smaller side, which for a square
layer is two layers of float32, and the vectors that are kept.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(**result)]
    quality = result.get("quality", [])
    if rows := [row for row in quality if not row.get("whole")]:
        parts += [QUALITY, _quality(rows, "cosine", max), _mixed_or_not(rows, "cosine", max)]
    if rows := [row for row in quality if row.get("whole")]:
        parts += [WHOLE, _quality(rows, "cosine", max)]
    if rows := [row for row in result.get("characters", ()) if row["share"] < 1]:
        dense = next(r["perplexity"] for r in result["characters"] if r["share"] == 1)
        parts += [CHARACTERS.format(dense=dense), _quality(rows, "perplexity", min)]
        parts += [_mixed_or_not(rows, "perplexity", min)]
    for name, text, what in (
        ("characters", HEALED, "perplexity"),
        ("minilm", HEALED_MINILM, "cosine"),
    ):
        rows = result.get("healed" if name == "characters" else f"healed_{name}", [])
        parts += _healings(rows, HEAL[name], text, what)
    rows = result.get("times", [])
    if rows:
        parts += [TIMES, _times(rows)]
    rows = result.get("speeds", [])
    if rows:
        parts += [SPEEDS, _speeds(rows)]
    rows = [row for row in result.get("memory", []) if "shape" in row]
    if rows:
        parts += [MEMORY, _memory(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


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


def _mixed_or_not(
    rows: Sequence[dict[str, Any]], what: str, best_of: Callable[[Iterable[float]], float]
) -> str:
    """Whether the mixed choice is as good as any single method at each size; by what is shown."""
    mixed = {row["share"]: row[what] for row in rows if row["contestant"] == "mixed, exact"}
    single = [row for row in rows if "mixed" not in row["contestant"]]
    behind = []
    for share in sorted(mixed, reverse=True):
        best = best_of(row[what] for row in single if row["share"] == share)
        if best_of((best, mixed[share])) != mixed[share] and f"{best:.3f}" != f"{mixed[share]:.3f}":
            (name, *_) = [row["contestant"] for row in single if row[what] == best]
            behind.append(f"at {share:.0%} *{name}* is better ({best:.3f})")
    if not mixed:
        return ""
    if not behind:
        return "*Mixed, exact* is at least as good as every single method in each column.\n"
    return (
        f"*Mixed, exact* is not the best in each column: {', '.join(behind)}. It is judged on "
        "calibration batches that are held out, which are few.\n"
    )


def _healings(rows: Sequence[dict[str, Any]], heal: str, text: str, what: str) -> list[str]:
    """A table of each healing that there are rows of, the one of all methods first."""
    trained = [row for row in rows if row.get("heal") == heal]
    fitted = [row for row in rows if "heal" not in row]
    parts = [text.format(heal=heal), _healed(trained, what)] if trained else []
    if fitted:
        first = text.partition("\n\n")[0] + "\n" if not trained else ""
        parts += [
            first + CLOSED_FORM.format(heal="heal{method=closed-form}"),
            _healed(fitted, what),
        ]
    return parts


def _healed(rows: Sequence[dict[str, Any]], what: str) -> str:
    shares = sorted({row["share"] for row in rows}, reverse=True)
    found = {
        (row["contestant"], row["share"]): f"{row['before']:.3f} → {row[what]:.3f}" for row in rows
    }
    order = {name: place for place, name in enumerate(CONTESTANTS)}
    names = sorted({row["contestant"] for row in rows}, key=order.__getitem__)
    table = [[name, *(found.get((name, share), "-") for share in shares)] for name in names]
    return markdown_table(["method", *(f"{share:.0%}" for share in shares)], table)


def _times(rows: Sequence[dict[str, Any]]) -> str:
    reference = {
        tuple(row["shape"]): row["seconds"] for row in rows if row["case"] == "torch.linalg.svd"
    }
    table = [
        [
            "x".join(map(str, row["shape"])),
            row["case"] + _size(row),
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / reference[tuple(row['shape'])]:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["matrix", "what", "seconds", "ratio"], table)


def _size(row: dict[str, Any]) -> str:
    if "linalg" in row["case"]:
        return ""
    return f", {'bond' if 'train' in row['case'] else 'rank'} {row['rank']}"


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
    depths = sorted({row["layers"] for row in rows if row["method"] != REFERENCE})
    found = {
        (r["method"], tuple(r["shape"]), r["layers"]): (r["peak_bytes"] - r["factors_bytes"])
        / r["layer_bytes"]
        for r in rows
    }
    table = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            if method != REFERENCE:
                cells = (f"{found[method, shape, depth]:.1f}" for depth in depths)
                alone = f"{found[REFERENCE, shape, 1]:.1f}"
                table.append([" x ".join(map(str, shape)), method, *cells, alone])
    header = ["layers of", "method", *(f"{depth} layers" for depth in depths), f"`{REFERENCE}`"]
    return markdown_table(header, table)


def main() -> int:
    """Write the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
