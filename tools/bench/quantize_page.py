"""Writes the measured part of ``docs/quantize.md`` from ``results/quantize_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench.bench_quantize import RESULTS
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "quantize.md"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.quantize_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_quantize` on {cpu} ({instructions}), torch {torch}.
"""

MINILM = """
### MiniLM

Mean and worst cosine of the embeddings of 96 sentences to those of the original; 128 others to
calibrate with. The 36 linear layers are quantised, embeddings stay. *Better* says for how many of
the swept layers the error of the outputs is below that of rounding to nearest on the same grid.
"""

CHARACTERS = """
### A language model of characters

Perplexity on text that was not trained on (a Llama of four layers and 160 channels); four batches
of training text to calibrate with. Groups are of 32, since 160 columns are no multiple of 128.
"""

SPEEDS = """
### Speed of an encoder

{layers} layers of BERT-base's sizes through the inductor, {threads} threads; medians, all
contestants in turn; other programs ran on the machine, so that *least* is given as well. *Error*
is that of the outputs, relative to fp32.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [HEAD.format(**result)]
    for key, text, score in (
        ("minilm", MINILM, "cosine"),
        ("characters", CHARACTERS, "perplexity"),
    ):
        if rows := result.get(key):
            parts += [text, _fidelity(rows, score)]
    if rows := result.get("speeds"):
        parts += [SPEEDS.format(layers=rows[0]["layers"], threads=rows[0]["threads"])]
        parts += [_speeds(rows)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _fidelity(rows: Sequence[dict[str, Any]], score: str) -> str:
    table = []
    for row in rows:
        swept = row.get("swept")
        better = f"{row['better_than_nearest']} of {swept}" if swept else ""
        worst = [f"{row['worst']:.4f}"] if score == "cosine" else []
        value = f"{row[score]:.5f}" if score == "cosine" else f"{row[score]:.3f}"
        table.append([row["contestant"], f"{row['bits']:.2f}", value, *worst, better])
    header = ["what", "bits a weight", score, *(["worst"] if score == "cosine" else []), "better"]
    return markdown_table(header, table)


def _speeds(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        [
            "x".join(map(str, row["tokens"])),
            row["contestant"],
            f"{1e3 * row['seconds']:.0f}",
            f"{1e3 * row['least']:.0f}",
            f"{row['to_fp32']:.2f}",
            f"{row['to_bf16']:.2f}",
            f"{row['error']:.4f}",
        ]
        for row in rows
    ]
    header = ["batch x tokens", "what", "ms", "least ms", "times fp32", "times bf16", "error"]
    return markdown_table(header, table)


def main() -> int:
    """Write the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
