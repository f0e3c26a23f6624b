"""Perplexity with quantised keys and values: the second half of excerpts, given the first.

The model is the small language model that is trained on Python's documentation. Keys and values of
the first half of each excerpt are kept in few bits, and so are those of the second, which are read
in one step. Quality alone: nothing here is timed. Writes ``results/quantize_cache.json`` and the
measured part of ``docs/quantize_cache.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir.files import write_text
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["PAGE", "RESULTS", "main", "measured"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "quantize_cache.json"
PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "quantize_cache.md"
_BATCHES: Final = 6
_HEAD: Final = """\
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.bench_cache`; do not edit. -->

Perplexity per character of a Llama of four layers on the second half of {excerpts} excerpts that it
was not trained on, given the keys and values of the first, both in few bits; heads of {channels}
channels. *Error* is that of the outputs, relative and squared.
"""
_SPECS: Final = {
    "as it is": "",
    "8 bits": "quantize-cache",
    "4 bits": "quantize-cache{bits=4}",
    "4 bits, not rotated": "quantize-cache{bits=4,rotate=false}",
    "4 bits, groups of 16": "quantize-cache{bits=4,group=16}",
    "4 bits, keys by channel": "quantize-cache{bits=4,keys=channel}",
    "4 bits, keys by channel, not rotated": "quantize-cache{bits=4,rotate=false,keys=channel}",
}


class _Half(nn.Module):
    """Logits of the tokens after those that are in the cache, and all keys and values."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body

    def forward(self, tokens: torch.Tensor, rows: list[torch.Tensor]) -> Any:
        from transformers import DynamicCache

        count = len(rows) // 2
        pairs = list(zip(rows[:count], rows[count:], strict=True))
        found = self.body(
            input_ids=tokens, past_key_values=DynamicCache(pairs) if pairs else None, use_cache=True
        )
        layers = found.past_key_values.layers
        return found.logits, [x.keys for x in layers] + [x.values for x in layers]


def measure(console: Console, batches: int = _BATCHES) -> list[dict[str, Any]]:
    """A row for each form of the cache."""
    from torchlathe.passes.rewrite.quantising.quantize_cache import stored_inputs
    from torchlathe.tools.bench.character_model import batches as excerpts
    from torchlathe.tools.bench.character_model import trained

    model = _Half(trained().body).eval()
    data = list(excerpts(batches, 16, test=True, seed=1))
    half = data[0].shape[1] // 2
    inputs = []
    with torch.no_grad():
        for tokens in data:
            _, rows = model(tokens[:, :half], [])
            inputs.append((tokens[:, half:], [row.clone() for row in rows]))
        program = capture(model, inputs[0])
        found = []
        for name, spec in _SPECS.items():
            after = PassManager(spec, verify=False).run(program)
            lost = count = 0.0
            for tokens, rows in inputs:
                args, _ = stored_inputs(after, (tokens, rows), {})
                logits = after.run(*args)[0][:, :-1].flatten(0, 1)
                wanted = tokens[:, 1:].flatten()
                lost += float(nn.functional.cross_entropy(logits, wanted, reduction="sum"))
                count += len(wanted)
            statistics = after.history[-1].statistics if spec else {}
            width = inputs[0][1][0].shape[-1]
            row = {
                "contestant": name,
                "spec": spec,
                "channels": width,
                "bits": 8 * float(statistics.get("bytes_of_a_row", 4 * width)) / width,
                "perplexity": math.exp(lost / count),
                "output_error": statistics.get("output_error", 0.0),
            }
            console.print(row)
            found.append(row)
    return found


def measured(result: dict[str, Any]) -> str:
    """The table as text.

    Args:
        result: The content of the result file.
    """
    rows = result["rows"]
    head = _HEAD.format(excerpts=16 * _BATCHES, channels=rows[0]["channels"])
    table = [
        [
            row["contestant"],
            f"{row['bits']:g}",
            f"{row['perplexity']:.3f}",
            f"{row['output_error']:.2g}",
        ]
        for row in rows
    ]
    return head + "\n" + markdown_table(["cache", "bits a number", "perplexity", "error"], table)


def main(argv: list[str] | None = None) -> int:
    """Measure all forms.

    Args:
        argv: The words of the command line; by default those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = measure(Console())
    data = {"machine": machine(), "rows": rows}
    write_text(options.output, json.dumps(data, indent=1) + "\n")
    return rewrite_measured(PAGE, measured(data)) if options.output == RESULTS else 0


if __name__ == "__main__":
    sys.exit(main())
