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
from itertools import pairwise
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
from torchlathe.tools.bench.machine import machine

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "sensitivity_cpu.json"
METHODS: Final = ("kfac", "diagonal", "drawn", "ggn", "hessian")
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
        exact: Changes of a kind that are also predicted by running over the data, at most.
        weights: Layers that are changed, at most about so many.
        drawn: Whether units are predicted from draws too, a run over the data per family.
    """

    name: str
    program: Program
    batches: list[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    draws: int = 8
    exact: int = 24
    weights: int = 18
    drawn: bool = True


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

    return Case("MiniLM", program, batches, loss, exact=12, weights=9, drawn=False)


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
    for family in families[::every]:
        costs = s.unit_costs(family, method="drawn") if case.drawn else None
        for unit in torch.randperm(family.extent, generator=generator)[:_UNITS].tolist():
            erased = s.erase(family, [unit])
            first = s.predict(erased, "diagonal").first
            cost = None if costs is None else float(costs[unit])
            yield "erase a unit", erased, cost
            tenth = {name: delta / 10 for name, delta in erased.items()}
            small = None if cost is None else first / 10 + (cost - first) / 100
            yield "shrink a unit by 10 %", tenth, small
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
    s = analysis.on(case.program, calibration=case.batches, loss=case.loss)
    seconds = time.perf_counter() - start
    base = s.objective.value()
    kinds: dict[str, list[dict[str, float]]] = {}
    drawn = list(changes(case, s))
    for kind in dict.fromkeys(kind for kind, _, _ in drawn):
        mine = [(delta, cost) for other, delta, cost in drawn if other == kind]
        every = -(-len(mine) // case.exact)
        for number, (delta, cost) in enumerate(mine):
            row = {"measured": s.objective.value(delta) - base}
            if cost is not None:
                row["drawn"] = cost
            for method in (
                "kfac",
                "diagonal",
                *(("ggn", "hessian") if number % every == 0 else ()),
            ):
                found = s.predict(delta, method)
                row[method], row[f"{method} second"] = found.total, found.second
            kinds.setdefault(kind, []).append(row)
    kinds["all"] = [row for rows in kinds.values() for row in rows]
    for kind, rows in kinds.items():
        result: dict[str, Any] = {
            "net": case.name,
            "kind": kind,
            "changes": len(rows),
            "exact_changes": sum(1 for row in rows if "hessian" in row),
            "loss": base,
            "median_change": median(abs(row["measured"]) for row in rows),
            "analysis_seconds": seconds,
        }
        for method in METHODS:
            usable = [row for row in rows if method in row]
            if len(usable) < (1 if method in ("ggn", "hessian") else len(rows)):
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
    """Processor seconds of training steps, and of each batch of an analysis.

    Every other batch has a probe of the Hessian's trace, so that what one costs is known apart.
    """
    size.step(0)  # what is made at the first step is made
    start = time.process_time()
    program = size.program()
    captured = time.process_time() - start
    ticks = [time.process_time()]
    analysis = HessianSensitivity(samples=size.count // 2, **options)
    analysis.on(
        program,
        calibration=size.batches,
        progress=lambda text: ticks.append(time.process_time()),
    )
    ticks.append(time.process_time())
    training = []
    for index in range(size.count):
        start = time.process_time()
        size.step(index)
        training.append(time.process_time() - start)
    seconds = [b - a for a, b in pairwise(ticks)]
    setup, plain, probed = seconds[0], median(seconds[1::2]), median(seconds[2::2])
    step = median(training)
    default = HessianSensitivity().samples
    return {
        "options": str(HessianSensitivity(**options)),
        "parameters": sum(t.numel() for t in program.parameters.values()),
        "batch": [size.batch, size.tokens],
        "batches": size.count,
        "samples": default,
        "capture_s": captured,
        "setup_s": setup,
        "batches_s": seconds[1:],
        "training_s": training,
        "ratio": (setup + (_BATCHES - default) * plain + default * probed) / (_BATCHES * step),
        "ratio_unprobed": plain / step,
        "ratio_probed": probed / step,
    }


def peak_bytes(what: str, size: Training, options: dict[str, Any]) -> int:
    """Peak resident memory of a process that does one of the two on a batch."""
    if what == "training":
        size.step(0)
        size.step(0)
    elif what == "sensitivity":
        HessianSensitivity(samples=1, **options).on(size.program(), calibration=size.batches[:1])
    else:
        size.program()
    # Of this program alone: what getrusage tells begins with the peak of the parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_row(size: Training, options: dict[str, Any], threads: int) -> dict[str, int]:
    """Peak memory of each, in processes of their own."""
    found = {}
    for what in ("capture", "training", "sensitivity"):
        command = [sys.executable, "-m", "torchlathe.tools.bench.bench_sensitivity"]
        command += ["--peak", what, "--shape", str(size.batch), str(size.tokens)]
        command += ["--threads", str(threads)]
        for key, value in options.items():
            command += [f"--{key.replace('_', '-')}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{what}_peak_bytes"] = int(done.stdout.split()[-1])
    return found


# -- running -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure, and put the rows into the JSON file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--case", choices=CASES, action="append", help="only this net")
    parser.add_argument("--cost", action="store_true", help="only the cost of the analysis")
    parser.add_argument("--count", type=int, default=6, help="batches and steps (default 6)")
    parser.add_argument("--shape", type=int, nargs=2, default=(8, 64), help="sentences, tokens")
    parser.add_argument("--rows", type=int, default=128, help="rows in the factors (default 128)")
    parser.add_argument("--limit-bytes", type=int, default=2**31)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    options = {"rows": parsed.rows, "limit_bytes": parsed.limit_bytes}
    console = Console() if sys.stdout.isatty() else Console(width=140)
    if parsed.peak:
        size = Training(parsed.shape[0], parsed.shape[1], 1)
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
        peaks = memory_row(size, options, parsed.threads)
        result["cost"] = {**cost_row(size, options), **peaks}
        console.print(result["cost"], highlight=False)
        _write(parsed.json, result)
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
