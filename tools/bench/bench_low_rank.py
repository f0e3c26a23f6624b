"""Low-rank splits of MiniLM: agreement against size, the time of a split, and the speed of layers.

The encoder is pretrained; its calibration and test sentences are disjoint parts of Python's
documentation. Nothing is trained after the split. Each part of the result file is kept when the
others are measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console

from torchlathe import capture
from torchlathe.ir import Program
from torchlathe.ir.files import write_text
from torchlathe.passes import LowRankSplit, PassContext
from torchlathe.passes.rewrite.factorising.low_rank import Sources
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.sensitivity import output_weights
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.splits import svd_split, whitened_split
from torchlathe.tools.bench.machine import machine

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "low_rank_cpu.json"
SHARES: Final = (0.7, 0.5, 0.35)
CONTESTANTS: Final = {
    "svd, uniform": {"method": "svd", "allocation": "uniform"},
    "svd, allocated": {"method": "svd"},
    "fisher-weighted, uniform": {"method": "fisher-weighted", "allocation": "uniform"},
    "whitened, uniform": {"allocation": "uniform"},
    "whitened and joint, uniform": {"allocation": "uniform", "joint": True},
    "whitened, allocated by layer errors": {"weigh": "layer"},
    "whitened, allocated": {},
    "whitened and joint, allocated": {"joint": True},
    "mixed, greedy": {"method": "mixed", "allocation": "greedy"},
    "mixed, exact": {"method": "mixed"},
}
_SENTENCES, _TEST, _BATCH = 256, 96, 32


class Remembered:
    """Statistics that each method collects once, for all sizes."""

    def __init__(self) -> None:
        self._metrics: dict[str, Metrics] = {}
        self._effects: dict[str, dict[str, float]] = {}

    def metrics(
        self, program: Program, ctx: PassContext, sites: Sequence[Site], method: str
    ) -> Metrics:
        """As `collect_metrics`."""
        key = "whitened-svd" if method == "mixed" else method
        if key not in self._metrics:
            self._metrics[key] = collect_metrics(program, ctx, sites, key)
        found = self._metrics[key]
        by_name = {site.weight: site for site in sites}

        def moved(values: Any) -> dict[Site, Any]:
            return {by_name[site.weight]: value for site, value in values.items()}

        return replace(
            found, inputs=moved(found.inputs), means=moved(found.means), rows=moved(found.rows)
        )

    def effects(
        self,
        program: Program,
        ctx: PassContext,
        sites: Sequence[Site],
        metrics: Metrics,
        method: str,
        damping: float,
    ) -> dict[Site, float]:
        """As `output_weights`."""
        if method not in self._effects:
            found = output_weights(program, ctx, sites, metrics, method, damping)
            self._effects[method] = {site.weight: value for site, value in found.items()}
        return {site: self._effects[method][site.weight] for site in sites}


def quality(console: Console, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each contestant and size that is not done yet."""
    from torchlathe.tools.demo_minilm import compare_embeddings, embed, load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    encoder, tokenizer = load_encoder()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    test = sentences[:_TEST]
    # Sentences of like length stand together, so that few of the positions are padding.
    seen = sorted(sentences[_TEST : _TEST + _SENTENCES], key=len)
    batches = [tokenizer(seen[i : i + _BATCH]) for i in range(0, len(seen), _BATCH)]
    random.Random(1).shuffle(batches)
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(encoder, (), dict(batches[0]), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test)

    def loss(outputs: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which other sentence is nearest, with answers drawn from the encoder's own."""
        logits = 20 * outputs @ outputs.T - 1e3 * torch.eye(len(outputs))
        return F.cross_entropy(logits, torch.multinomial(logits.detach().softmax(1), 1)[:, 0])

    kept = Remembered()
    sources = Sources(kept.metrics, kept.effects)
    for name, options in CONTESTANTS.items():
        for share in SHARES:
            if any((row["contestant"], row["share"]) == (name, share) for row in done):
                continue
            chosen = LowRankSplit(share=share, **options)  # type: ignore[arg-type]
            after = program.copy()
            ctx = PassContext(after, chosen.spec(), calibration=batches, loss=loss)
            start = time.perf_counter()
            result = chosen.run_with(after, ctx, sources)
            seconds = time.perf_counter() - start
            found = compare_embeddings(before, embed(after.run, tokenizer, test), test)
            statistics = result.statistics
            row = {
                "contestant": name,
                "spec": chosen.spec(),
                "share": share,
                "kept": int(statistics["kept_of_layers"]) / int(statistics["parameters_of_layers"]),
                "parameters": sum(p.numel() for p in after.parameters.values()),
                "cosine": found.cosine,
                "worst": found.worst_cosine,
                "spearman": found.spearman,
                "split": statistics["split"],
                "joint": statistics["joint"],
                "seconds": seconds,
            }
            console.print(f"{name}, {share:.0%}: cosine {found.cosine:.4f}, {seconds:.0f} s")
            yield row


def _clock() -> float:
    """Seconds of this thread alone where it does all the work, since other programs may run."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def times(sizes: list[tuple[int, int]], console: Console) -> Iterator[dict[str, Any]]:
    """Time of one split over that of one ``torch.linalg.svd``, interleaved."""
    for outs, ins in sizes:
        weight = torch.randn(outs, ins)
        data = torch.randn(2 * ins, ins) * torch.rand(ins)
        moment = (data.T @ data / len(data)).double()
        del data
        half, low = outs * ins // (2 * (outs + ins)), min(outs, ins) // 16
        cases: dict[str, Callable[[], object]] = {
            "torch.linalg.svd": partial(torch.linalg.svd, weight, full_matrices=False),
            "svd, half": partial(svd_split, weight, half),
            "whitened, half": partial(whitened_split, weight, moment, half),
            "svd, low rank": partial(svd_split, weight, low),
            "whitened, low rank": partial(whitened_split, weight, moment, low),
        }
        rounds = 1 if outs * ins > 10_000_000 else 3
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, call in cases.items():
                start = _clock()
                call()
                seconds[name].append(_clock() - start)
        found = {name: median(values) for name, values in seconds.items()}
        reference = found["torch.linalg.svd"]
        for name, value in found.items():
            console.print(f"{outs}x{ins} {name}: {value:.2f} s, {value / reference:.2f}")
            rank = low if "low" in name else half
            yield {
                "shape": [outs, ins],
                "case": name,
                "rank": rank,
                "seconds": value,
                "ratio": value / reference,
                "rounds": rounds,
            }


def speeds(console: Console, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Time of the dense layer over that of its factors, at the same number of threads."""
    for outs, ins in ((384, 384), (1536, 384), (4096, 4096)):
        for share in SHARES:
            rank = int(share * outs * ins / (outs + ins))
            weight, down, up = (
                torch.randn(shape) for shape in ((outs, ins), (rank, ins), (outs, rank))
            )
            for rows in (1, 32, 256):
                x = torch.randn(rows, ins)
                row = {"shape": [outs, ins], "share": share, "rank": rank, "rows": rows}
                for mode in ("eager", "inductor") if compiled else ("eager",):
                    row[mode] = _ratio(x, weight, down, up, mode)
                console.print(f"{row}")
                yield row


def _dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)


def _factors(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, down), up)


def _ratio(
    x: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, mode: str
) -> float:
    dense: Any = _dense if mode == "eager" else torch.compile(_dense, dynamic=False)
    factors: Any = _factors if mode == "eager" else torch.compile(_factors, dynamic=False)
    with torch.no_grad():
        dense(x, weight)
        factors(x, down, up)
        count = max(3, min(2000, int(4e9 / (2 * x.shape[0] * weight.numel() + 1e6))))
        pairs = []
        for _ in range(7):
            start = _clock()
            for _ in range(count):
                dense(x, weight)
            middle = _clock()
            for _ in range(count):
                factors(x, down, up)
            pairs.append((middle - start) / (_clock() - middle))
    return median(pairs)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("quality", "times", "speeds"))
    parser.add_argument("--sizes", nargs="+", default=["1024x2752"], help="of the timed split")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--compiled", action="store_true", help="time the inductor too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    console = Console()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    wanted = parsed.only or ("quality", "times", "speeds")
    sizes = [(int(a), int(b)) for a, b in (size.split("x") for size in parsed.sizes)]
    if "quality" in wanted:
        rows = result.setdefault("quality", []) if parsed.resume else []
        for row in quality(console, list(rows)):
            rows.append(row)
            result["quality"] = rows
            write_text(parsed.out, json.dumps(result, indent=1) + "\n")
    if "times" in wanted:
        fresh = list(times(sizes, console))
        shapes = [row["shape"] for row in fresh]
        result["times"] = [r for r in result.get("times", ()) if r["shape"] not in shapes] + fresh
    if "speeds" in wanted:
        result["speeds"] = list(speeds(console, compiled=parsed.compiled))
    result |= machine()
    write_text(parsed.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
