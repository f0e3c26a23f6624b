"""How well curvature predicts what small changes cost, and what the analysis itself costs.

Each row is a kind of change on a net: the rank correlation over many changes between the change of
the loss that was predicted and the one that was measured, both on the same batches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console

from torchlathe import capture
from torchlathe.ir import Program
from torchlathe.passes import HessianSensitivity
from torchlathe.passes.analysis.curvature import (
    Sensitivity,
    low_rank_delta,
    quantise_delta,
    tie_delta,
)
from torchlathe.passes.analysis.curvature.drawn import VECTORS
from torchlathe.passes.analysis.curvature.sensitivity import Method
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.memory import PeakMemory

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "sensitivity_cpu.json"
METHODS: Final = ("auto", "kfac", "diagonal", "drawn", "ggn", "hessian")
_BATCHES: Final = 64  # that the ratio is composed for
_UNITS, _RANKS, _BITS, _STEPS = 3, (0.97, 0.9), (8, 6), (0.02, 0.05)

Delta = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A net with a loss near its minimum.

    Attributes:
        name: Of the net.
        program: The net.
        batches: Of data.
        loss: Of outputs and a batch.
        draws: Per batch, for the factors.
        whole: Changes of a kind that are also predicted by the whole Gauss-Newton matrix, at most.
        exact: And by the whole Hessian.
        weights: Layers that are changed, at most about so many.
    """

    name: str
    program: Program
    batches: list[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    draws: int = 8
    whole: int = 1000
    exact: int = 24
    weights: int = 18


def digits_case(name: str) -> Case:
    """A net trained on the digits; cross-entropy on training images."""
    from torchlathe.tools.bench.quality.nets import digits, trained

    data = digits(0)
    program = capture(trained(name, 0), (data.test[0][:4],), dynamic_shapes="auto")

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch[1])

    return Case(name, program, list(data.batches[:4]), loss)


def encoder_case() -> Case:
    """MiniLM; the squared distance to its own embeddings, which is stationary at the weights."""
    from torchlathe.tools.demo_minilm import load_encoder, split_sentences

    encoder, tokenizer = load_encoder()
    sentences = split_sentences()[0]
    batches = []
    for start in (0, 6):
        batch = dict(tokenizer(sentences[start : start + 6]))
        with torch.no_grad():
            batch["target"] = encoder(**batch)
        batches.append(batch)
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
    names = ("input_ids", "attention_mask")
    inputs = {name: batches[0][name] for name in names}
    program = capture(encoder, (), inputs, dynamic_shapes=dict.fromkeys(names, axes))

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        distance: torch.Tensor = (outputs - batch["target"]).square().sum(1).mean()
        return distance

    return Case("MiniLM", program, batches, loss, whole=12, exact=4, weights=9)


CASES: Final[dict[str, Callable[[], Case]]] = {
    "digits CNN": lambda: digits_case("digits CNN"),
    "digits ViT": lambda: digits_case("digits ViT"),
    "MiniLM": encoder_case,
}


# -- predictions ---------------------------------------------------------------------------------


def changes(case: Case, s: Sensitivity, seed: int = 0) -> Iterator[tuple[str, Delta, float | None]]:
    """Small changes of each kind, drawn from a seed, with what draws predict of units."""
    generator = torch.Generator().manual_seed(seed)
    families = s.families.prunable
    every = max(1, len(families) // 10)
    for family, costs in s.costs_of(families[::every], method="drawn").items():
        for unit in torch.randperm(family.extent, generator=generator)[:_UNITS].tolist():
            erased = s.erase(family, [unit])
            first = s.predict(erased, "diagonal").first
            cost = float(costs[unit])
            yield "erase a unit", erased, cost
            tenth = {name: delta / 10 for name, delta in erased.items()}
            yield "shrink a unit by 10 %", tenth, first / 10 + (cost - first) / 100
    weights = list(dict.fromkeys(layer.weight for layer in s.layers.values()))
    weights = weights[:: max(1, len(weights) // case.weights)]
    values = {name: case.program.tensor(name).detach() for name in weights}
    for name, value in values.items():
        for bits in _BITS:
            yield "round to 8 or 6 bits", {name: quantise_delta(value, bits)}, None
        full = min(value.flatten(1).shape)
        for share in _RANKS:
            rank = min(full - 1, round(full * share))
            yield "cut 3 or 10 % of the ranks", {name: low_rank_delta(value, rank)}, None
        others = [v for n, v in values.items() if n != name and v.shape == value.shape]
        for other, step in zip(others, _STEPS, strict=False):
            mean = (value + other) / 2
            yield "move 2 or 5 % to a shared weight", {name: step * tie_delta(mean, value)}, None


def prediction_rows(case: Case) -> Iterator[dict[str, Any]]:
    """A row for each kind of change, and one for all."""
    from scipy.stats import spearmanr

    start = time.perf_counter()
    analysis = HessianSensitivity(samples=0, draws=case.draws)
    assert analysis.method == "auto"
    s = analysis.on(case.program, calibration=case.batches, loss=case.loss)
    seconds = time.perf_counter() - start
    base = s.objective.value()
    kinds: dict[str, list[dict[str, float]]] = {}
    drawn = list(changes(case, s))
    for kind in dict.fromkeys(kind for kind, _, _ in drawn):
        mine = [(delta, cost) for other, delta, cost in drawn if other == kind]
        some, few = (-(-len(mine) // most) for most in (case.whole, case.exact))
        for number, (delta, cost) in enumerate(mine):
            row = {"measured": s.objective.value(delta) - base}
            if cost is not None:
                row["drawn"] = cost
            methods: list[Method] = ["kfac", "diagonal"]
            if number % some == 0:
                methods.append("ggn")
            if number % few == 0:
                methods.append("hessian")
            for method in methods:
                found = s.predict(delta, method)
                row[method], row[f"{method} second"] = found.total, found.second
            # What the default asks: `unit_costs` for units, `predict` for anything else.
            default = "drawn" if kind == "erase a unit" else "ggn"
            if default in row:
                row["auto"] = row[default]
            kinds.setdefault(kind, []).append(row)
    kinds["all"] = [row for rows in kinds.values() for row in rows]
    for kind, rows in kinds.items():
        result: dict[str, Any] = {
            "net": case.name,
            "kind": kind,
            "changes": len(rows),
            "whole_changes": sum(1 for row in rows if "ggn" in row),
            "exact_changes": sum(1 for row in rows if "hessian" in row),
            "loss": base,
            "median_change": median(abs(row["measured"]) for row in rows),
            "analysis_seconds": seconds,
            "drawn_vectors": VECTORS,
        }
        for method in METHODS:
            usable = [row for row in rows if method in row]
            if len(usable) < (len(rows) if method == "drawn" else 1):
                result[method] = None
                continue
            measured = [row["measured"] for row in usable]
            result[method] = float(spearmanr([r[method] for r in usable], measured).statistic)
            errors = [abs(r[method] - r["measured"]) / abs(r["measured"]) for r in usable]
            result[f"{method}_error"] = median(errors)
        yield result


# -- cost ----------------------------------------------------------------------------------------


@dataclass
class Training:
    """A BERT-base classifier with random weights, its data, and an optimizer."""

    batch: int
    tokens: int
    count: int

    def __post_init__(self) -> None:
        """Make the model and the batches."""
        import transformers

        from torchlathe.tools.compat import define_torchvision_ops

        define_torchvision_ops()
        torch.manual_seed(0)
        config = transformers.BertConfig(num_labels=2)
        self.model = transformers.BertForSequenceClassification(config).eval()
        self.batches = [
            {
                "input_ids": torch.randint(config.vocab_size, (self.batch, self.tokens)),
                "attention_mask": torch.ones(self.batch, self.tokens, dtype=torch.int64),
                "labels": torch.randint(2, (self.batch,)),
            }
            for _ in range(self.count)
        ]
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, index: int) -> None:
        """One step of AdamW, in eval mode: without dropout's time, as the analysis."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(**self.batches[index]).loss.backward()
        self.optimizer.step()

    def program(self) -> Program:
        """The captured model."""
        return capture(self.model, (), self.batches[0])


def cost_row(size: Training, options: dict[str, Any]) -> dict[str, Any]:
    """Processor seconds of training steps, and of each batch of an analysis, in turn.

    Every other batch has a probe of the Hessian's trace, so that what one costs is known apart.
    """
    size.step(0)  # what is made at the first step is made
    start = time.process_time()
    program = size.program()
    captured = time.process_time() - start
    training, (setup, *each) = _seconds(program, size, options)
    return {
        "options": str(HessianSensitivity(rows=options["rows"])),
        "parameters": sum(t.numel() for t in program.parameters.values()),
        "batch": [size.batch, size.tokens],
        "samples": HessianSensitivity().samples,
        "capture_s": [captured],
        "setup_s": [setup],
        "plain_s": each[::2],
        "probed_s": each[1::2],
        "training_s": training,
    }


def ratios(row: dict[str, Any]) -> tuple[float, float, float]:
    """To a training step: a batch, a batch with a probe, and 64 batches with the default probes."""
    setup, plain, probed, step = (
        median(row[key]) for key in ("setup_s", "plain_s", "probed_s", "training_s")
    )
    probes = row["samples"]
    whole = setup + (_BATCHES - probes) * plain + probes * probed
    return plain / step, probed / step, whole / (_BATCHES * step)


def _seconds(
    program: Program, size: Training, options: dict[str, Any]
) -> tuple[list[float], list[float]]:
    """Of training steps; of the analysis until its first batch, and of each batch.

    A training step runs before each batch. Every other batch has a probe.
    """
    training: list[float] = []
    analysis: list[float] = []
    began = time.process_time()

    def step(text: str) -> None:
        nonlocal began
        now = time.process_time()
        analysis.append(now - began)
        size.step(len(training))
        began = time.process_time()
        training.append(began - now)

    found = HessianSensitivity(samples=size.count // 2, **options)
    found.on(program, calibration=size.batches, progress=step)
    analysis.append(time.process_time() - began)
    return training, analysis


def peak_bytes(what: str, size: Training, options: dict[str, Any]) -> int:
    """Peak anonymous memory of a process that does one of the things on a batch."""
    with PeakMemory() as memory:
        if what == "training":
            size.step(0)
            size.step(0)
        elif what == "sensitivity":
            analysis = HessianSensitivity(samples=1, **options)
            analysis.on(size.program(), calibration=size.batches[:1])
        else:
            size.program()
    return memory.peak


def memory_bytes(what: str, size: Training, options: dict[str, Any], threads: int) -> int:
    """Peak memory of one of the things, in a process of its own."""
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_sensitivity"]
    command += ["--peak", what, "--shape", str(size.batch), str(size.tokens)]
    command += ["--threads", str(threads)]
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def add_cost(
    known: dict[str, Any], size: Training, rows: int, limit: int, threads: int
) -> Iterator[dict[str, Any]]:
    """More seconds for one limit, beside those there are, and then peaks that are not known yet."""
    options = {"rows": rows, "limit_bytes": limit}
    row = cost_row(size, options)
    limits = known.setdefault("limits", {})
    old = limits.setdefault(str(limit), {})
    for key, value in row.items():
        if key.endswith("_s"):
            value = old.get(key, []) + value
        old[key] = value
    yield known
    peaks = known.setdefault("peaks", {})
    if "training" not in peaks:
        peaks["training"] = memory_bytes("training", size, {}, threads)
        yield known
    if "peak" not in old:
        old["peak"] = memory_bytes("sensitivity", size, options, threads)
        yield known


# -- running -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure, and put the rows into the JSON file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--case", choices=CASES, action="append", help="only this net")
    parser.add_argument("--cost", action="store_true", help="only the cost of the analysis")
    parser.add_argument("--count", type=int, default=2, help="batches and steps (default 2)")
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 64), help="sentences, tokens")
    parser.add_argument("--rows", type=int, default=128, help="rows in the factors (default 128)")
    parser.add_argument(
        "--limit-bytes", type=int, action="append", help="memory (2 GiB and 512 MiB)"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    limits = parsed.limit_bytes or [2**31, 2**29]
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if parsed.peak:
        size = Training(parsed.shape[0], parsed.shape[1], 1)
        options = {"rows": parsed.rows, "limit_bytes": limits[0]}
        console.print(peak_bytes(parsed.peak, size, options), highlight=False)
        return 0
    result = _read(parsed.json)
    for name in parsed.case or ([] if parsed.cost else CASES):
        rows = list(prediction_rows(CASES[name]()))
        result["rows"] = [row for row in result["rows"] if row["net"] != name] + rows
        for row in rows:
            _show(console, row)
        _write(parsed.json, result)
    if parsed.cost or not parsed.case:
        size = Training(parsed.shape[0], parsed.shape[1], parsed.count)
        for limit in limits:
            known = result["cost"] or {}
            for found in add_cost(known, size, parsed.rows, limit, parsed.threads):
                result["cost"] = found
                _write(parsed.json, result)
            console.print(ratios(known["limits"][str(limit)]), highlight=False)
    return 0


def _show(console: Console, row: dict[str, Any]) -> None:
    told = {method: row[method] for method in METHODS if row.get(method) is not None}
    texts = [f"{method} {value:.3f}" for method, value in told.items()]
    low = [method for method, value in told.items() if value < 0.9]
    console.print(
        f"{row['net']}, {row['kind']}, {row['changes']} changes: {', '.join(texts)}"
        + (f"; below 0.9: {', '.join(low)}" if low else ""),
        highlight=False,
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"rows": [], "cost": None}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {"rows": found["rows"], "cost": found["cost"]}


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    order = list(CASES)
    data["rows"].sort(key=lambda row: order.index(row["net"]))
    text = json.dumps({"benchmark": "sensitivity", **machine(), **data}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
