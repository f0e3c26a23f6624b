"""Writes the measured part of ``docs/tensor_networks.md`` from the results of the benchmark."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.bench_tensor_networks import RESULTS, SHARES, TYPES
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured
from torchlathe.tools.bench.tensor_networks_recipe import STEPS

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "tensor_networks.md"
LOW_RANK: Final = RESULTS.with_name("low_rank_cpu.json")

HEAD = """
## Measured

<!-- Written from here on by `python -m torchlathe.tools.bench.tensor_networks_page`. -->

`python -m torchlathe.tools.bench.bench_tensor_networks` on {cpu}, {threads} thread, torch {torch}.
"""

LAYERS = """
### Layers of MiniLM

Squared error of the outputs, relative to their variance, on 96 sentences that no method saw, for
the layers of the fifth block at equal parameters; calibrated on 256 other sentences. *svd* and
*train, svd* keep the weight, all others the outputs; *train* has 2 sites but in *train, 3 sites*.
"""

QUALITY = """
### MiniLM as a whole

Mean cosine of the embeddings of 96 sentences to those of the original, by the share of the
parameters of the 36 linear layers that is kept, the same for each layer; nothing is trained after
the split. The lines of low-rank splits are those of [their page](low_rank.md#measured), of the same
sentences.
"""

CHARACTERS = """
### A language model

Perplexity per character of a Llama of four layers, trained on Python's documentation, on text that
it did not see; {original:.3f} as it is. The budget is allocated among the layers.
"""

RECIPE = """
### The recipe of CompactifAI

A tensor train that keeps 30 % of the parameters of its layers, {steps} steps of `heal`, and cores
in few bits (all else in 8), on the same language model. The paper's claim is 93 % less memory and
70 % fewer parameters for a loss of 2 to 3 % in accuracy, on models of 7 billion parameters. Here a
whitened low-rank split in the place of the tensor train comes near to that, and the tensor train
does not; `int4` alone, with all parameters kept, loses least.
"""

RECIPE_MINILM = """
The same on MiniLM, whose embedding of words is more than half of it and is not split: mean cosine
of the embeddings of sentences to those of the original, as above. After so short a healing neither
split comes near to the claim, and `int8` alone, with all parameters kept, loses nothing that shows.
"""

SPEEDS = """
### Speed

Time of the dense layer over that of its network (eager, float32; above 1 is faster): contracted /
with the matrix built. FLOPs are those of contracting, relative to the dense layer. Other programs
ran on the machine; the three products of a cell were timed in turn.
"""


def measured(result: dict[str, Any], low_rank: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
        low_rank: That of the benchmark of low-rank splits.
    """
    parts = [HEAD.format(**result)]
    if rows := result.get("layers"):
        parts += [LAYERS, _layers(rows)]
    if rows := result.get("quality"):
        parts += [QUALITY, _quality(rows, low_rank.get("quality", ()))]
    if rows := result.get("characters"):
        original = next(row["perplexity"] for row in rows if row["contestant"] == "original")
        parts += [CHARACTERS.format(original=original), _by_share(rows, "perplexity", "{:.3f}")]
    if rows := result.get("recipe"):
        parts += [RECIPE.format(steps=STEPS), _recipe(rows, "perplexity")]
    if rows := result.get("recipe_minilm"):
        parts += [RECIPE_MINILM, _recipe(rows, "cosine")]
    if rows := result.get("speeds"):
        parts += [SPEEDS, _speeds(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _layers(rows: Sequence[dict[str, Any]]) -> str:
    columns = {
        "svd": "svd",
        "train, svd": "tensor train, 2 sites, svd",
        "whitened svd": "whitened svd",
        "train": "tensor train, 2 sites",
        "train, 3 sites": "tensor train, 3 sites",
        "kronecker": "kronecker, skew 2",
    }
    table = []
    for kind in TYPES:
        for row in sorted(rows, key=lambda row: -row["share"]):
            if row["type"] != kind:
                continue
            values = [row["errors"][key][1] for key in columns.values()]
            cells = [
                f"**{value:.3f}**" if value == min(values) else f"{value:.3f}" for value in values
            ]
            table.append([kind, f"{row['share']:.0%}", *cells])
    return markdown_table(["layer", "kept", *columns], table)


def _quality(rows: Sequence[dict[str, Any]], low_rank: Sequence[dict[str, Any]]) -> str:
    plain = {"svd, uniform": "svd", "whitened, uniform": "whitened svd"}
    named = [
        row | {"contestant": plain[row["contestant"]]}
        for row in low_rank
        if row["contestant"] in plain
    ]
    shown = [row | {"contestant": row["contestant"].removesuffix(", uniform")} for row in rows]
    return _by_share([*named, *shown], "cosine", "{:.3f}")


def _by_share(rows: Sequence[dict[str, Any]], key: str, form: str) -> str:
    found = {(row["contestant"], row["share"]): row[key] for row in rows}
    names = [n for n in dict.fromkeys(row["contestant"] for row in rows) if n != "original"]

    def cell(name: str, share: float) -> str:
        return form.format(found[name, share]) if (name, share) in found else "-"

    table = [[name, *(cell(name, share) for share in SHARES)] for name in names]
    return markdown_table(["method", *(f"{share:.0%}" for share in SHARES)], table)


def _recipe(rows: Sequence[dict[str, Any]], what: str) -> str:
    (original,) = (row[what] for row in rows if row["contestant"] == "original")
    table = [
        [
            row["contestant"],
            f"{row['parameters']:.0%}",
            f"{row['bytes']:.1%}",
            f"{row[what]:.3f}",
            f"{row[what] / original - 1:+.1%}",
        ]
        for row in rows
    ]
    return markdown_table(["", "parameters", "bytes", what, "change"], table)


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    counts = list(rows[0]["ratios"])
    table = [
        [
            "x".join(map(str, row["shape"])),
            f"{row['share']:.0%}",
            row["network"],
            f"{row['flops']:.2g}",
            *(" / ".join(f"{value:.2f}" for value in row["ratios"][count]) for count in counts),
        ]
        for row in rows
    ]
    header = ["layer", "kept", "network", "FLOPs", *(f"{count} rows" for count in counts)]
    return markdown_table(header, table)


def main() -> int:
    """Write the page; returns the exit status."""
    results = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, LOW_RANK))
    return rewrite_measured(PAGE, measured(*results))


if __name__ == "__main__":
    sys.exit(main())
