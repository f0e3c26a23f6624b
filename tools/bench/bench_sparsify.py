"""What zeros cost: patterns and methods on a character model and on MiniLM.

Writes ``results/sparsify_cpu.json``, row by row, and the measured part of ``docs/sparsify.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

import torchlathe as tl
from torchlathe.ir import Program
from torchlathe.ir.files import write_text
from torchlathe.tools.bench.character_model import batches, perplexity, trained
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured
from torchlathe.tools.bench.minilm import encoder_task

__all__ = ["main", "measured"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "sparsify_cpu.json"
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "sparsify.md"
METHODS: Final = ("magnitude", "wanda", "sparsegpt")
PATTERNS: Final = {
    "2:4": "pattern=2:4",
    "2:4, channels permuted": "pattern=2:4",
    "4:8": "pattern=4:8",
    "50 % anywhere": "pattern=unstructured",
    "70 % anywhere": "pattern=unstructured,sparsity=0.7",
    "50 % in blocks of 8": "pattern=block,block=8",
}
_MODELS: Final = ("characters", "minilm")

HEAD = """
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.bench_sparsify`; do not edit. -->

`python -m torchlathe.tools.bench.bench_sparsify` on {cpu}, {threads} thread, torch {torch}. In
brackets the mean relative squared error of the layers' outputs, for magnitudes that of the weights.
Nothing is trained afterwards.

"""
TEXTS = {
    "characters": """\
Perplexity per character of a Llama of four layers on text that it has not seen, {dense:.3f} as it
is (`torchlathe.tools.bench.character_model`); 16 batches of 16 excerpts to calibrate with.
""",
    "minilm": """\
Mean cosine of MiniLM's embeddings of 96 sentences of Python's documentation to those of the
original; 256 others to calibrate with.
""",
}


def _characters() -> tuple[Program, list[Any], Callable[[Program], float], float]:
    model = trained()
    data = list(batches(16, seed=3))
    program = tl.capture(model, (data[0],), dynamic_shapes="auto")
    return program, data, lambda found: perplexity(found.run), perplexity(model)


def _minilm() -> tuple[Program, list[Any], Callable[[Program], float], float]:
    program, data, cosine = encoder_task(256)
    return program, data, lambda found: cosine(found.run), 1.0


def rows(
    models: Sequence[str], done: Sequence[dict[str, Any]], console: Console
) -> Iterator[dict[str, Any]]:
    """A row for each model, pattern and method that is not done yet."""
    for name in models:
        program, data, judge, dense = _characters() if name == "characters" else _minilm()
        for pattern, options in PATTERNS.items():
            for method in METHODS:
                key = {"model": name, "pattern": pattern, "method": method}
                if any(key.items() <= row.items() for row in done):
                    continue
                text = f"sparsify-nm{{{options},method={method}}}"
                if "permuted" in pattern:
                    text = f"permute-channels,{text}"
                start = time.thread_time()
                found = tl.PassManager(text).run(program.copy(), calibration=data)
                statistics = found.history[-1].statistics
                row = {
                    **key,
                    "pipeline": text,
                    "dense": dense,
                    "score": judge(found),
                    "zeros": statistics["zeros"],
                    "error": statistics["mean_error"],
                    "cpu_seconds": time.thread_time() - start,
                }
                console.print(f"{name}, {pattern}, {method}: {row['score']:.4f}")
                yield row


def measured(result: dict[str, Any]) -> str:
    """The tables as text."""
    parts = [HEAD.format(**result)]
    for name in _MODELS:
        mine = [row for row in result["rows"] if row["model"] == name]
        if not mine:
            continue
        parts.append(TEXTS[name].format(dense=mine[0]["dense"]) + "\n")
        table = []
        for pattern in PATTERNS:
            cells = {row["method"]: row for row in mine if row["pattern"] == pattern}
            if cells:
                table.append([pattern, *(_cell(cells.get(method)) for method in METHODS)])
        parts.append(markdown_table(["zeros", *METHODS], table) + "\n")
    return "".join(parts).rstrip() + "\n"


def _cell(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{row['score']:.3f} ({row['error']:.2g})"


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=_MODELS, default=list(_MODELS))
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after that")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.monotonic()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    kept = [] if parsed.fresh else list(result.get("rows", ()))
    if not parsed.page:
        for row in rows(parsed.models, list(kept), Console()):
            kept.append(row)
            result = {"rows": kept, **machine()}
            write_text(parsed.out, json.dumps(result, indent=1) + "\n")
            if time.monotonic() - start > 60 * parsed.minutes:
                break
    if parsed.out == RESULTS:
        return rewrite_measured(PAGE, measured(result).lstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
