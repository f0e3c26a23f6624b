"""Fewer units, low rank and fewer bits: each alone, and one after the other, at the same bytes.

Each way is at its best: units go with the layers that read them refitted, splits are whitened and
allocated, bits are swept (GPTQ) and, where they are alone, mixed by integer programming. All see
the same calibration batches. Writes ``results/composition_cpu.json`` row by row; what is there
stays. ``python -m torchlathe.tools.bench.composition_page`` writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

import torchlathe as tl
from torchlathe.backends import CompiledModel
from torchlathe.ir import Error, Program
from torchlathe.ir.files import write_text
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.minilm import encoder_task

__all__ = ["ALONE", "BUDGETS", "PIPELINES", "main", "pipeline"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "composition_cpu.json"
# Shares of the bytes that the linear layers have in fp32; all else stays as it is. In the order of
# what they tell: 4-bit numbers take 14 %, 2-bit ones 9 %.
BUDGETS: Final = (0.1, 0.08, 0.06, 0.12)
_BITS: Final = "quantize{scheme=w4a16,group=32,method=gptq}"
_MIXED: Final = "quantize{scheme=w4a16,group=32,method=gptq,schemes=[w2a16,w4a16,w8a16],bytes=B}"
# Tables of embeddings stay as they are: no other step takes anything of them.
_TABLES: Final = ("*embed*",)
# Bytes of a pipeline's steps: B is what the whole is allowed, D what may be left before 4 bits take
# their part of it, and E lies between that and the whole.
PIPELINES: Final = {
    "erase": "structured-erase{compensate=true,bytes=B}",
    "low rank": "low-rank-split{bytes=B,exclude=X}",
    "bits": _MIXED,
    "erase, bits": f"structured-erase{{compensate=true,bytes=D}},{_BITS}",
    "low rank, bits": f"low-rank-split{{bytes=D,exclude=X}},{_BITS}",
    "erase, low rank, bits": "structured-erase{compensate=true,bytes=E},"
    f"low-rank-split{{bytes=D,exclude=X}},{_BITS}",
}
ALONE: Final = ("erase", "low rank", "bits")
# Of 4-bit numbers with a 16-bit scale for 32 of them; the last group of a row may be shorter.
_FOUR_BITS: Final = 4.6 / 32
_ERASED_FIRST: Final = 0.3  # of the way to D, in logarithms


@dataclass(frozen=True)
class Task:
    """A model with what it is measured by.

    Attributes:
        program: As it is.
        data: Calibration batches.
        score: Perplexity or cosine.
        spared: Patterns of what is not split.
    """

    program: Program
    data: list[Any]
    score: Callable[[Callable[..., Any]], float]
    spared: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Bytes of the weights of linear layers."""
        sites, _ = find_sites(self.program)
        return sum(4 * site.parameters for site in sites if site.kind == "linear")


def pipeline(name: str, share: float, whole: int, layers: int, spared: Sequence[str] = ()) -> str:
    """The text of a pipeline for a share of the layers' bytes.

    Args:
        name: One of `PIPELINES`.
        share: Of the bytes of the layers, to keep.
        whole: Bytes of the model.
        layers: Bytes of its linear layers.
        spared: Patterns of what is not split.
    """
    rest = whole - layers
    kept = rest + share * layers
    dense = rest + min(1.0, share / _FOUR_BITS) * layers
    between = rest + layers * (min(1.0, share / _FOUR_BITS) ** _ERASED_FIRST)
    text = PIPELINES[name].replace("exclude=X", f"exclude={json.dumps(list(spared))}")
    for letter, value in (("B", kept), ("D", dense), ("E", between)):
        text = text.replace(f"bytes={letter}", f"bytes={value:.0f}")
    return text


def characters() -> Task:
    """The language model: perplexity of the next character."""
    from torchlathe.tools.bench.character_model import batches, perplexity, trained

    model = trained()
    data = list(batches(8, seed=3))
    test = list(batches(24, test=True, seed=1))
    program = tl.capture(model, (data[0],), dynamic_shapes="auto")
    return Task(program, data, lambda run: perplexity(run, test), _TABLES)


def minilm() -> Task:
    """The sentence encoder: mean cosine to its own embeddings as they were."""
    return Task(*encoder_task(128), _TABLES)


TASKS: Final = {"characters": characters, "minilm": minilm}


def rows(
    name: str, budgets: list[float], done: list[dict[str, Any]], console: Console
) -> Iterator[dict[str, Any]]:
    """A row for each way and budget that is not done yet."""
    keys: list[dict[str, Any]]
    keys = [{"model": name, "way": way, "budget": b} for b in budgets for way in PIPELINES]
    keys = [key for key in keys if not any(key.items() <= row.items() for row in done)]
    if not keys:
        return
    task = TASKS[name]()
    whole, layers = task.program.cost().bytes, task.layers
    if not any(row["model"] == name and row["way"] == "" for row in done):
        score = task.score(CompiledModel(task.program))
        yield {"model": name, "way": "", "budget": 1.0, "share": 1.0, "score": score}
    for key in keys:
        text = pipeline(key["way"], key["budget"], whole, layers, task.spared)
        start = time.thread_time()
        row: dict[str, Any] = {**key, "pipeline": text, "share": None, "score": None}
        try:
            found = tl.PassManager(text, verify=False).run(task.program, calibration=task.data)
        except Error as error:
            row["reason"] = getattr(error.__cause__, "message", error.message)
        else:
            row["share"] = 1 - (whole - found.cost().bytes) / layers
            row["score"] = task.score(CompiledModel(found))
        row["cpu_seconds"] = time.thread_time() - start
        console.print(f"{name}, {key['budget']:.0%}, {key['way']}: {row['score']} {row['share']}")
        yield row


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after that")
    parser.add_argument(
        "--again", nargs="+", choices=list(PIPELINES), default=[], help="ways to measure again"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.monotonic()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    old = result.get("rows", ())
    kept = [r for r in old if r["model"] not in parsed.models or r["way"] not in parsed.again]
    for name in parsed.models:
        for row in rows(name, parsed.budgets, list(kept), Console()):
            kept.append(row)
            write_text(parsed.out, json.dumps({"rows": kept, **machine()}, indent=1) + "\n")
            if time.monotonic() - start > 60 * parsed.minutes:
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
