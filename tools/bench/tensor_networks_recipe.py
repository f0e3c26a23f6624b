"""CompactifAI's recipe: a tensor train, a short healing, low-bit cores; next to plain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.tools.bench import character_model

__all__ = ["STEPS", "recipe"]

Row = dict[str, Any]

STEPS: Final = 30
_SPLITS: Final = {
    "whitened svd": "low-rank-split{share=0.3,time=false}",
    "tensor train": "tensor-train-split{share=0.3,time=false}",
}
_HEAL: Final = f"heal{{steps={STEPS}}}"
# What is no core is quantised too, embeddings among it.
_EIGHT: Final = "quantize{scheme=w8a16,embeddings=true}"
_BITS: Final = {
    "whitened svd": {"int8": _EIGHT, "int4": "quantize{scheme=w4a16,embeddings=true}"},
    "tensor train": {
        "int8 cores": f"quantize-cores{{scheme=w8a16}},{_EIGHT}",
        "int4 cores": f"quantize-cores{{scheme=w4a16}},{_EIGHT}",
    },
}


def recipe(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Perplexity of the character model after each step, with what is left of it."""
    model = character_model.trained()
    batches = list(character_model.batches(12, seed=3))
    test = list(character_model.batches(12, test=True, seed=1))
    axes = {0: torch.export.Dim("batch", max=256)}
    program = capture(model, (batches[0],), dynamic_shapes=(axes,))
    names = {row["contestant"] for row in done}
    whole = program.cost()

    def measured(name: str, spec: str, after: Program, weights: int, start: float) -> Row:
        seconds = time.perf_counter() - start
        row = {
            "contestant": name,
            "spec": spec,
            "parameters": weights / whole.parameters,
            "bytes": after.cost().bytes / whole.bytes,
            "perplexity": character_model.perplexity(after.run, test),
            "seconds": seconds,
        }
        console.print(f"{name}: {row}")
        return row

    if "original" not in names:
        yield measured("original", "", program, whole.parameters, time.perf_counter())
    for bits, spec in _BITS["whitened svd"].items():
        if bits not in names:
            start = time.perf_counter()
            after = PassManager(spec).run(program)
            yield measured(bits, spec, after, whole.parameters, start)
    for kind in _SPLITS:
        yield from _healed(kind, program, batches, names, measured)


def _healed(
    kind: str,
    program: Program,
    batches: Sequence[Any],
    names: Collection[str],
    measured: Callable[[str, str, Program, int, float], Row],
) -> Iterator[Row]:
    """The rows of one split: as it is, healed, and with few bits."""
    split = _SPLITS[kind]
    start = time.perf_counter()
    if kind not in names:
        after = PassManager(split).run(program, calibration=batches)
        yield measured(kind, split, after, after.cost().parameters, start)
    missing = [bits for bits in _BITS[kind] if f"{kind}, healed, {bits}" not in names]
    if f"{kind}, healed" in names and not missing:
        return
    start = time.perf_counter()
    spec = f"{split},{_HEAL}"
    healed = PassManager(spec).run(program, calibration=batches)
    weights = healed.cost().parameters
    if f"{kind}, healed" not in names:
        yield measured(f"{kind}, healed", spec, healed, weights, start)
    for bits in missing:
        start = time.perf_counter()
        small = _BITS[kind][bits]
        after = PassManager(small).run(healed)
        yield measured(f"{kind}, healed, {bits}", f"{spec},{small}", after, weights, start)
