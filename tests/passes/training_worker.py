"""A training in a process of its own: to be killed, or one of several under torchrun.

Run as ``python -m tests.passes.training_worker KIND OUT [checkpoint=DIR] [die=STEP]``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.training import Forward, Hook, Trainer, TrainingOptions


class TiedDecoder(nn.Module):
    """Two blocks, a scalar parameter, and an embedding that is the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            for _ in range(2)
        )
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + self.gain * self.drop(layer(x))
        logits: torch.Tensor = self.head(x)
        return logits


class NormNet(nn.Module):
    """Convolutions with batch norm, in numbered blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        logits: torch.Tensor = self.head((x + self.body(x)).mean((2, 3)))
        return logits


class DieAt(Hook):
    """Ends the process without any chance to tidy up."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make(kind: str) -> tuple[tl.Program, list[Any]]:
    """A program and batches (inputs, labels), the same in each process."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    if kind == "norm":
        xs = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(8)]
        batches = [(x, torch.randint(4, (6,), generator=generator)) for x in xs]
        return tl.capture(NormNet().eval(), (xs[0],), dynamic_shapes="auto"), batches
    tokens = [torch.randint(11, (6, 5), generator=generator) for _ in range(8)]
    batches = [(x, x.roll(1, 1)) for x in tokens]
    return tl.capture(TiedDecoder().eval(), (tokens[0],), dynamic_shapes="auto"), batches


def loss(forward: Forward) -> torch.Tensor:
    """Cross entropy of the labels that each batch has."""
    return F.cross_entropy(forward.outputs.flatten(0, -2), forward.batch[1].flatten())


def train(
    kind: str, *, hooks: list[Hook] | None = None, dropout: bool = True, **options: Any
) -> Any:
    """Train, and give the trainer and its result."""
    torch.set_num_threads(1)
    program, batches = make(kind)
    chosen = {"steps": 12, "lr": 1e-2, "save_every": 3, "evaluate_every": 4, "keep_best": False}
    trainer = Trainer(
        program,
        PassContext(program, "test", batches, seed=3),
        TrainingOptions(**{**chosen, "dropout": dropout, **options}),
        objective=loss,
        hooks=hooks or [],
    )
    torch.manual_seed(5)
    return trainer, trainer.run()


def heal() -> tl.Program:
    """A pipeline that splits layers, heals them, and knows nothing of processes."""
    torch.set_num_threads(1)
    program, batches = make("tied")
    passes = "low-rank-split{rank=2,method=svd},heal{method=distil,steps=8,lr=0.01,hidden=0.5}"
    return tl.PassManager(passes).run(program, calibration=[x for x, _ in batches])


def distil() -> tl.Program:
    """A pipeline that splits layers and distils by a temperature that follows the loss."""
    torch.set_num_threads(1)
    program, batches = make("tied")
    passes = (
        "low-rank-split{rank=2,method=svd},distill{steps=8,lr=0.01,dropout=false,accumulate=2,"
        "temperature=8.0,temperature-schedule=loss,outputs=logits,held_out=0.2}"
    )
    return tl.PassManager(passes).run(program, calibration=[x for x, _ in batches])


def main() -> None:
    """Train and write what came of it."""
    from safetensors.torch import save_file

    kind, out, *rest = sys.argv[1:]
    if kind in ("heal", "distil"):
        torch.distributed.init_process_group("gloo")
        after = heal() if kind == "heal" else distil()
        if torch.distributed.get_rank() == 0:
            save_file({n: t.detach() for n, t in after.parameters.items()}, Path(out))
        torch.distributed.destroy_process_group()
        return
    given = dict(text.split("=") for text in rest)
    several = "RANK" in os.environ
    if several:
        torch.distributed.init_process_group("gloo")
    hooks: list[Hook] = [DieAt(int(given["die"]))] if "die" in given else []
    _, result = train(
        kind,
        hooks=hooks,
        dropout=not several,
        checkpoint=given.get("checkpoint"),
        accumulate=int(given.get("accumulate", 1)),
    )
    if not several or torch.distributed.get_rank() == 0:
        losses = torch.tensor(result.losses, dtype=torch.float64)
        resumed = torch.tensor(result.resumed_at)
        save_file({**result.tensors, "losses": losses, "resumed": resumed}, Path(out))
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
