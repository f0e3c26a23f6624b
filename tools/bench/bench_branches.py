"""Accuracy after whole branches were erased, by importance; nothing is trained afterwards.

The digits ViT (six branches) is trained here; MiniLM (twelve) is the pretrained sentence encoder,
judged by how it ranks pairs of sentences against the whole encoder. "In turn" measures again after
each branch, as a pipeline of passes with ``count=1``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.passes import EraseOperators, Segments
from torchlathe.passes.rewrite.branches.leave_out import erase_branches
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.quality.nets import accuracy, digits, trained

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "branches_cpu.json"
CRITERIA: Final = ("output-change", "taylor", "magnitude", "random")
_DRAWS: Final = 5  # of random branches
_SENTENCES: Final = 96


@dataclass(frozen=True)
class Task:
    """A net, how it is judged, and the data that criteria may see.

    Attributes:
        name: Of the net.
        program: The net.
        batches: Calibration data.
        loss: For criteria that need one.
        metric: Higher is better.
        counts: Numbers of branches to erase.
    """

    name: str
    program: Program
    batches: Sequence[Any]
    loss: Callable[[Any, Any], torch.Tensor] | None
    metric: Callable[[Program], float]
    counts: tuple[int, ...]


def digits_task(seed: int) -> Task:
    """The digits ViT, trained from this seed."""
    model, data = trained("digits ViT", seed), digits(seed)
    program = capture(model, (data.test[0][:4],), dynamic_shapes="auto")

    def loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(outputs, batch[1])

    def metric(after: Program) -> float:
        return accuracy(after.run, data)

    return Task("digits ViT", program, data.batches[:2], loss, metric, (1, 2, 3, 4))


def encoder_task() -> Task:
    """The sentence encoder; Spearman correlation of the similarities of pairs of sentences."""
    from scipy.stats import spearmanr

    from torchlathe.tools.demo_minilm import embed, load_encoder, split_sentences

    encoder, tokenizer = load_encoder()
    calibration, test = split_sentences()
    test = test[:_SENTENCES]
    batches = [tokenizer(calibration[i : i + 16]) for i in range(0, 32, 16)]
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(encoder, (), dict(batches[0]), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test)
    pairs = torch.triu_indices(len(test), len(test), offset=1)
    similar = (before @ before.T)[pairs[0], pairs[1]]

    def metric(after: Program) -> float:
        found = embed(after.run, tokenizer, test)
        alike = (found @ found.T)[pairs[0], pairs[1]]
        return float(spearmanr(similar.numpy(), alike.numpy()).statistic)

    return Task("MiniLM", program, batches, None, metric, (1, 2, 3, 4, 6))


def rows(task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """A row for each way to choose, and each number of branches."""
    whole = task.metric(task.program)
    branches = len(task.program.analysis(Segments).removable)
    for importance in CRITERIA:
        if importance == "taylor" and task.loss is None:
            continue
        for in_turn in (False, True):
            if in_turn and importance in ("magnitude", "random"):
                continue  # it would choose the same
            for count in task.counts:
                draws = _DRAWS if importance == "random" else 1
                start = time.perf_counter()
                found = [_erase(task, importance, count, draw, in_turn) for draw in range(draws)]
                seconds = (time.perf_counter() - start) / draws
                yield {
                    "net": task.name,
                    "seed": seed,
                    "branches": branches,
                    "whole": whole,
                    "importance": importance,
                    "in_turn": in_turn,
                    "count": count,
                    "metric": sum(map(task.metric, found)) / draws,
                    "left": sum(_share(task.program, after) for after in found) / draws,
                    "seconds": seconds,
                }


def _erase(task: Task, importance: str, count: int, seed: int, in_turn: bool) -> Program:
    one = EraseOperators(count=1 if in_turn else count, importance=importance)
    manager = PassManager([one] * (count if in_turn else 1), verify="off")
    return manager.run(task.program, calibration=task.batches, loss=task.loss, seed=seed)


def _share(before: Program, after: Program) -> float:
    sizes = [sum(t.numel() for t in p.parameters.values()) for p in (before, after)]
    return sizes[1] / sizes[0]


def analysis_rows() -> Iterator[dict[str, Any]]:
    """Processor seconds of the analysis and of erasing half of the branches; median of five."""
    import transformers

    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    config = transformers.BertConfig(vocab_size=99, hidden_size=96, intermediate_size=192)
    nets: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "BERT, 12 layers": (transformers.BertModel(config), torch.randint(99, (2, 8))),
        "100 residual blocks": (nn.Sequential(*(_Block() for _ in range(100))), torch.zeros(2, 4)),
        "400 residual blocks": (nn.Sequential(*(_Block() for _ in range(400))), torch.zeros(2, 4)),
    }
    for name, (model, example) in nets.items():
        program = capture(model.eval(), (example,))
        program.cost().at()
        analysing, erasing = [], []
        for _ in range(5):
            copy = program.copy()
            copy.adopt_analyses(program.cached_analyses())
            start = time.process_time()
            branches = copy.analysis(Segments).branches
            middle = time.process_time()
            erase_branches(copy, branches[: len(branches) // 2])
            analysing.append(middle - start)
            erasing.append(time.process_time() - middle)
        yield {
            "net": name,
            "nodes": sum(1 for _ in program.nodes),
            "branches": len(branches),
            "segments": median(analysing),
            "erase": median(erasing),
        }


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual branch of four calls."""
        y: torch.Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + y


def main(argv: list[str] | None = None) -> int:
    """Measure and write the JSON file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the ViT (default 3)")
    parser.add_argument("--analysis", action="store_true", help="only time the analysis")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    if options.analysis:
        timed = list(analysis_rows())
        for row in timed:
            console.print(row, highlight=False)
        _write(options.json.with_stem("branches_analysis_cpu"), {"rows": timed})
        return 0
    found = []
    makers: list[Callable[[], Task]] = [partial(digits_task, s) for s in range(options.seeds)]
    for seed, make in [*enumerate(makers), (0, encoder_task)]:
        for row in rows(make(), seed):
            found.append(row)
            how = f"{row['importance']}{' in turn' if row['in_turn'] else ''}"
            console.print(
                f"{row['net']} {seed} {how} {row['count']}: {row['metric']:.3f} of "
                f"{row['whole']:.3f}, {row['left']:.2f} left, {row['seconds']:.2f} s",
                highlight=False,
            )
    _write(options.json, {"seeds": options.seeds, "rows": found})
    return 0


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": "branches", **machine(), **data}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
