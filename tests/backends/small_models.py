"""Models and programs that the tests of the backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from torchlathe.backends import CompiledModel, Lowerable
from torchlathe.ir import Program, capture


class Perceptron(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, width)
        self.fc2 = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Tied(nn.Module):
    """Tied weights, a shared module, all kinds of buffers, a constant, and dict outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.LayerNorm(6))
        self.again = self.block
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
        self.register_buffer("scale", torch.full((6,), 0.5))
        self.register_buffer("shift", torch.randn(6), persistent=False)
        self.register_buffer("unread", torch.arange(5))
        self.plain = torch.linspace(0.1, 0.6, 6)

    def forward(self, ids: torch.Tensor, *, mask: torch.Tensor) -> dict[str, object]:
        x = self.embedding(ids) * mask.unsqueeze(-1)
        x = self.again(self.block(x)) * self.scale + self.shift + self.frozen
        x = x + self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        return {"logits": self.head(x), "pooled": (x.mean(1), None), "size": ids.shape[1]}


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def tied_inputs(batch: int = 2, length: int = 5) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 11, (batch, length))
    return ids, {"mask": torch.ones(batch, length)}


def dynamic_perceptron(model: nn.Module) -> Program:
    return capture(model, (torch.randn(2, 4),), dynamic_shapes="auto")


KEPT = torch.tensor([0, 2, 3, 7])
GONE = torch.tensor([1, 4, 5, 6])


def erase_by_hand(program: Program) -> Program:
    """Erase half of the hidden channels of a `Perceptron`, as a pass does."""
    program = program.copy()
    with program.edit(by="by-hand") as edit:
        for name in ("fc1.weight", "fc1.bias"):
            edit.record_zeroed(name, 0, GONE)
            edit.keep(name, {0: KEPT})
        edit.keep("fc2.weight", {1: KEPT})
    return program


def same_outputs(
    first: Callable[..., torch.Tensor], second: Callable[..., torch.Tensor], *args: torch.Tensor
) -> bool:
    with torch.no_grad():
        return torch.equal(first(*args), second(*args))


def lowerable(program: Program) -> Lowerable:
    """A program with tensors of its own, as backends get it."""
    state: Any = CompiledModel(program, "eager").__dict__["_torchlathe"]
    return Lowerable(state.program, state.tensors, state.paths)
