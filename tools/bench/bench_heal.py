"""What healing brings back after a low-rank split, and how long it takes.

Run ``python -m torchlathe.tools.bench.bench_heal``; rows that the result file has are kept, so an
interrupted run goes on. Times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe.backends import CompiledModel
from torchlathe.ir import Program, capture
from torchlathe.ir.files import write_text
from torchlathe.passes import PassManager
from torchlathe.tools.bench.machine import machine

__all__ = ["RESULTS", "Case", "main"]

RESULTS: Final = Path(__file__).with_name("results") / "heal_cpu.json"
SPLIT: Final = "low-rank-split{params=0.5,method=whitened-svd,allocation=uniform}"
HEALING: Final = (
    "heal{method=closed-form}",
    "heal{method=distil,steps=40,lr=LR}",
    "heal{steps=40,lr=LR}",
    "heal{method=blockwise,steps=40,lr=LR}",
    "heal{steps=40,lr=LR,hidden=1.0}",
)


@dataclass(frozen=True)
class Case:
    """One model with its data.

    Attributes:
        name: Of the model.
        program: It, captured.
        batches: To calibrate and train with.
        measure: Quality on other data, by name.
        rate: Learning rate for it.
    """

    name: str
    program: Program
    batches: Sequence[Any]
    measure: Callable[[Program], dict[str, float]]
    rate: str


def characters() -> Case:
    """The character model: 48 batches of 8 excerpts, and the perplexity of others."""
    from torchlathe.tools.bench.character_model import batches, perplexity, trained

    data = list(batches(48, 8, seed=7, context=64))
    program = capture(trained(), (data[0],), dynamic_shapes="auto")
    test = list(batches(12, test=True, seed=1, context=64))

    def measure(found: Program) -> dict[str, float]:
        return {"perplexity": perplexity(CompiledModel(found), test)}

    return Case("character model", program, data, measure, "0.001")


def minilm() -> Case:
    """The sentence encoder: 192 sentences, and the cosine to the original's for 64 others."""
    import random

    from torchlathe.tools.demo_minilm import _dynamic_shapes, load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    encoder, tokenizer = load_encoder()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    data = [tokenizer(sentences[i : i + 8]) for i in range(0, 192, 8)]
    test = [tokenizer(sentences[i : i + 16]) for i in range(200, 264, 16)]
    shapes = _dynamic_shapes()
    program = capture(encoder, example_kwargs=data[0], dynamic_shapes=shapes)

    def measure(found: Program) -> dict[str, float]:
        run = CompiledModel(found)
        with torch.no_grad():
            pairs = [(run(**batch), encoder(**batch)) for batch in test]
        rows = [torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in pairs]
        return {"cosine to the original": float(torch.cat(rows).mean())}

    return Case("MiniLM", program, data, measure, "0.0001")


CASES: Final = {"character model": characters, "MiniLM": minilm}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing in the result file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=330.0, help="begin no row after these")
    parsed = parser.parse_args(argv)
    torch.set_num_threads(1)
    console = Console()
    end = time.monotonic() + parsed.seconds
    found: dict[str, Any] = {"rows": []}
    if parsed.json.exists():
        found = json.loads(parsed.json.read_text(encoding="utf-8"))
    for name in parsed.case or CASES:
        _measure_case(name, found, parsed.json, end, console)
    return 0


def _measure_case(
    name: str, found: dict[str, Any], path: Path, end: float, console: Console
) -> None:
    have = {(row["case"], row["passes"]) for row in found["rows"]}
    missing = [text for text in ("", SPLIT, *HEALING) if (name, text) not in have]
    if not missing or time.monotonic() > end:
        return
    case = CASES[name]()
    split = PassManager(SPLIT, verify="off").run(case.program, calibration=case.batches[:8])
    for text in missing:
        if time.monotonic() > end:
            return
        row = {"case": name, "passes": text, **_row(case, split, text)}
        found["rows"].append(row)
        found.update(machine())
        write_text(path, json.dumps(found, indent=1) + "\n")
        console.print(row)


def _row(case: Case, split: Program, text: str) -> dict[str, Any]:
    if not text.startswith("heal"):
        program = split if text else case.program
        return {"parameters": program.cost().parameters, **case.measure(program)}
    from torchlathe.passes.base import PassContext
    from torchlathe.passes.spec import parse_pipeline

    # The split is made once for all rows; so the original is handed over here.
    (heal,) = parse_pipeline(text.replace("LR", case.rate))
    program = split.copy()
    ctx = PassContext(program, heal.spec(), case.batches, original=case.program)
    torch.manual_seed(0)
    start = time.process_time()
    result = heal.run(program, ctx)  # type: ignore[attr-defined]  # a rewrite, as its name says
    seconds = time.process_time() - start
    return {
        "parameters": program.cost().parameters,
        "seconds": seconds,
        "held_out": result.details["healing"]["stages"],
        **case.measure(program),
    }


if __name__ == "__main__":
    sys.exit(main())
