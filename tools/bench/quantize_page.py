"""Writes the measured part of ``docs/quantize.md`` from ``results/quantize_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.tools.bench import bench_streaming
from torchlathe.tools.bench.bench_quantize import RESULTS
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured", "results"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "quantize.md"

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.quantize_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_quantize` on {cpu} ({instructions}), torch {torch}.
"""

MINILM = """
### MiniLM

Mean and worst cosine of the embeddings of 96 sentences to those of the original; 128 others to
calibrate with, in batches without padding. The 36 linear layers are quantised, embeddings stay.
*Better* says for how many of the swept layers the error of the outputs is below that of rounding to
nearest on the same grid.
"""

CHARACTERS = """
### A language model of characters

Perplexity on text that was not trained on (a Llama of four layers and 160 channels); four batches
of training text to calibrate with, the same for all. Groups are of 32, since 160 columns are no
multiple of 128. *Divergence* is the mean Kullback-Leibler divergence of the predictions from those
of the original, in thousandths of a nat: it tells apart what perplexity cannot.
"""

PEERS = """
Rows of llm-compressor are its own checkpoints ({versions}), read by
[load_checkpoint](checkpoints.md) and measured by the same code; *mse* is its observer of that name,
without which its ranges cover the largest weight. For all, torchao too, a group's scale counts 16
bits and a row's 32. Zero points are stored in 8 bits here and in 4 there: 4.75 bits against 4.62.
{only}"""

DECODERS: Final = """
There is no row of its AWQ and SmoothQuant: their mappings of norms to layers are those of decoders.
"""

SPEEDS = """
### Speed of an encoder

{layers} layers of BERT-base's sizes through the inductor with freezing, {threads} threads; medians
of wall clock, all contestants in turn; fp32 and bf16 are what `torch.compile` makes of the model.
Attention of fp32 and bf16 is torch.compile's own; rows of w8a8 write short attention out, as the
backend does by itself, which is part of their ratio (`short-attention=0` leaves it as it is).
{amx} *Error* is that of the outputs, relative to fp32.
"""

MEMORY: Final = """
### Memory of `gptq`

`python -m torchlathe.tools.bench.bench_streaming --size 1b --depths 16` and without options: random
Llamas in bf16 whose weights are mapped from a file, swept to 4 bits with the defaults on {tokens}
tokens; {threads} thread. *Peak* is what the memory of the process rises by, *may be* the model in
bf16 and two blocks. The widest layer has {wide} columns in the largest, {narrow} in the others.
The work on one layer is the same at any depth, and more than all of a small model.
"""

PAIRS: Final = {
    "w8a8": ("llm-compressor w8a8", "torchao w8a8"),
    "w8a8, smoothquant, products inserted": (
        "llm-compressor w8a8, smoothquant",
        "llm-compressor w8a8, smoothquant, gptq",
    ),
    "w8a16": ("torchao w8a16",),
    "w4a16": ("llm-compressor w4a16", "torchao w4a16"),
    "w4a16, clipped": ("llm-compressor w4a16, mse",),
    "w4a16, awq, products inserted": ("llm-compressor w4a16, awq",),
    "w4a16, gptq": ("llm-compressor w4a16, gptq", "llm-compressor w4a16, gptq, mse"),
    "w4a16, gptq, zero points": ("llm-compressor w4a16, gptq, zero points",),
    "w4a16, gptq, zero points, whole ranges": ("llm-compressor w4a16, gptq, zero points",),
    "w4a16, awq, zero points, products inserted": ("llm-compressor w4a16, awq, zero points",),
    "w4a8, gptq": ("llm-compressor w4a8, gptq",),
}


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
            peers = [row for row in rows if row["contestant"].startswith("llm-compressor")]
            if peers:
                versions = ", ".join(sorted({row["version"] for row in peers}))
                balanced = any("awq" in row["contestant"] for row in peers)
                only = "" if balanced else DECODERS.lstrip("\n")
                parts += [PEERS.format(versions=versions, only=only), _verdict(rows, score)]
    if rows := result.get("speeds"):
        has = "has" if "amx" in result["instructions"].lower() else "has no"
        sizes = {name: rows[0][name] for name in ("layers", "threads")}
        parts += [SPEEDS.format(**sizes, amx=f"The processor {has} AMX.")]
        parts += [_speeds(rows)]
    if memory := result.get("memory"):
        parts += [_memory(memory)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _memory(found: dict[str, Any]) -> str:
    rows = sorted(found["rows"], key=lambda row: row["parameters"])
    wide, narrow = (
        bench_streaming.SIZES[r["size"]]["intermediate_size"] for r in (rows[-1], rows[0])
    )
    table = [
        [
            f"{row['parameters'] / 1e6:,.0f} M",
            str(row["layers"]),
            *(
                f"{size / 1e6:,.0f}"
                for size in (
                    row["model_bytes"],
                    row["stored_bytes"],
                    row["peak_bytes"],
                    row["model_bytes"] + 2 * row["block_bytes"],
                )
            ),
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in rows
    ]
    header = ["parameters", "blocks", "bf16, MB", "stored, MB", "peak, MB", "may be, MB", "minutes"]
    threads = found["machine"]["threads"]
    text = MEMORY.format(tokens=rows[0]["tokens"], threads=threads, wide=wide, narrow=narrow)
    return text + "\n" + markdown_table(header, table)


def _fidelity(rows: Sequence[dict[str, Any]], score: str) -> str:
    table = []
    for row in rows:
        swept = row.get("swept")
        better = f"{row['better_than_nearest']} of {swept}" if swept else ""
        value = f"{row[score]:.5f}" if score == "cosine" else f"{row[score]:.3f}"
        second = f"{row['worst']:.4f}" if score == "cosine" else _thousandths(row)
        table.append([row["contestant"], f"{row['bits']:.2f}", value, second, better])
    second = "worst" if score == "cosine" else "divergence"
    return markdown_table(["what", "bits a weight", score, second, "better"], table)


def _thousandths(row: dict[str, Any]) -> str:
    found = row.get("divergence")
    return "" if found is None else f"{1e3 * found:.2f}"


def _verdict(rows: Sequence[dict[str, Any]], score: str) -> str:
    """Each of ours beside the best of the peers' rows of the same kind, and where it is behind."""

    def lost(name: str) -> float:
        row = found[name]
        return 1 - float(row["cosine"]) if score == "cosine" else float(row["divergence"])

    found = {r["contestant"]: r for r in rows if score == "cosine" or "divergence" in r}
    table, behind = [], []
    for own, peers in PAIRS.items():
        theirs = [name for name in peers if name in found]
        if own not in found or not theirs:
            continue
        best = min(theirs, key=lost)
        ratio = lost(own) / lost(best)
        table.append(
            [own, best, f"{1e3 * lost(own):.2f}", f"{1e3 * lost(best):.2f}", f"{ratio:.2f}"]
        )
        if ratio > 1.02:
            behind.append(own)
    what = "1 - cosine" if score == "cosine" else "divergence"
    text = markdown_table(
        ["ours", "best peer of the kind", f"{what}, thousandths", "theirs", "ratio"], table
    )
    text += "\nRatios up to 1.02 are within 2 %, which is not told apart.\n"
    if behind:
        text += f"Ours loses more (a ratio above 1.02) at: {'; '.join(behind)}.\n"
    return text


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


def results() -> dict[str, Any]:
    """The content of the result files, that of memory under a key of its own."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    found["memory"] = json.loads(bench_streaming.RESULTS.read_text(encoding="utf-8"))
    return found


def main() -> int:
    """Write the page; returns the exit status."""
    return rewrite_measured(PAGE, measured(results()))


if __name__ == "__main__":
    sys.exit(main())
