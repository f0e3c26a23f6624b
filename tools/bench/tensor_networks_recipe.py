"""CompactifAI's recipe: a tensor train, a short healing, low-bit cores; next to plain ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.passes import LowRankSplit, PassContext, TensorTrainSplit
from torchlathe.passes.rewrite.tensor_networks.network_split import NetworkSources
from torchlathe.passes.spec import parse_pipeline
from torchlathe.tools.bench import character_model
from torchlathe.tools.bench.low_rank.quality import encoder
from torchlathe.tools.bench.low_rank.remembering import Remembered

__all__ = ["STEPS", "recipe", "recipe_minilm"]

Row = dict[str, Any]

STEPS: Final = 30
_SHARE: Final = 0.3
_SPLITS: Final[dict[str, LowRankSplit | TensorTrainSplit]] = {
    "whitened svd": LowRankSplit(share=_SHARE, time=False),
    "tensor train": TensorTrainSplit(share=_SHARE, time=False),
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


@dataclass(frozen=True)
class _Case:
    """A model, what it is calibrated and healed with, and how it is judged."""

    program: Program
    batches: Sequence[Any]
    judge: Callable[[Program], Row]
    kept: Remembered
    console: Console

    def row(self, name: str, spec: str, after: Program, weights: int, start: float) -> Row:
        """What is left of the model, and how good it is."""
        seconds = time.perf_counter() - start
        whole = self.program.cost()
        row = {
            "contestant": name,
            "spec": spec,
            "parameters": weights / whole.parameters,
            "bytes": after.cost().bytes / whole.bytes,
            **self.judge(after),
            "seconds": seconds,
        }
        self.console.print(f"{name}: {row}")
        return row


def recipe(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Perplexity of the character model after each step, with what is left of it."""
    model = character_model.trained()
    batches = list(character_model.batches(12, seed=3))
    test = list(character_model.batches(12, test=True, seed=1))
    axes = {0: torch.export.Dim("batch", max=256)}
    program = capture(model, (batches[0],), dynamic_shapes=(axes,))

    def judge(after: Program) -> Row:
        return {"perplexity": character_model.perplexity(after.run, test)}

    yield from _rows(_Case(program, batches, judge, Remembered(), console), done)


def recipe_minilm(console: Console, done: Sequence[Row]) -> Iterator[Row]:
    """Agreement of MiniLM with itself after each step, with what is left of it."""
    program, batches, _, judge = encoder()
    kept = Remembered("low-rank-minilm")
    yield from _rows(_Case(program, batches, judge, kept, console), done)


def _rows(case: _Case, done: Sequence[Row]) -> Iterator[Row]:
    names = {row["contestant"] for row in done}
    weights = case.program.cost().parameters
    if "original" not in names:
        yield case.row("original", "", case.program, weights, time.perf_counter())
    for bits, spec in _BITS["whitened svd"].items():
        if bits not in names:
            start = time.perf_counter()
            after = PassManager(spec).run(case.program)
            yield case.row(bits, spec, after, weights, start)
    for kind in _SPLITS:
        yield from _healed(case, kind, names)


def _healed(case: _Case, kind: str, names: Collection[str]) -> Iterator[Row]:
    """The rows of one split: as it is, healed, and with few bits."""
    missing = [bits for bits in _BITS[kind] if f"{kind}, healed, {bits}" not in names]
    if {kind, f"{kind}, healed"} <= set(names) and not missing:
        return
    split, start = _SPLITS[kind], time.perf_counter()
    after = case.program.copy()
    ctx = PassContext(after, split.spec(), calibration=list(case.batches))
    if isinstance(split, LowRankSplit):
        split.run_with(after, ctx, case.kept.sources)
    else:
        split.run_with(after, ctx, NetworkSources(case.kept.metrics, case.kept.effects))
    weights = after.cost().parameters
    if kind not in names:
        yield case.row(kind, split.spec(), after, weights, start)
    start = time.perf_counter()
    spec = f"{split.spec()},{_HEAL}"
    (heal,) = parse_pipeline(_HEAL)
    healed = after.copy()
    ctx = PassContext(healed, heal.spec(), case.batches, original=case.program)
    heal.run(healed, ctx)  # type: ignore[attr-defined]  # a rewrite, as its name says
    if f"{kind}, healed" not in names:
        yield case.row(f"{kind}, healed", spec, healed, weights, start)
    for bits in missing:
        start = time.perf_counter()
        small = _BITS[kind][bits]
        few = PassManager(small).run(healed)
        yield case.row(f"{kind}, healed, {bits}", f"{spec},{small}", few, weights, start)
