"""Small stacks with planted structure, for the tests of sharing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import Program

__all__ = ["WHICH", "Block", "Stack", "planted", "planted_program", "program_of"]

# Which template each layer of `planted` is a copy of.
WHICH = (0, 1, 1, 0, 1, 0)
WIDTH, HIDDEN = 12, 24


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act = act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Stack(nn.Module):
    """Equal blocks and a head."""

    def __init__(self, depth: int = len(WHICH), act: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(Block(act) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def planted(
    which: Sequence[int] = WHICH,
    *,
    noise: float = 0.0,
    permute: bool = True,
    scale: bool = False,
    seed: int = 0,
    act: nn.Module | None = None,
) -> Stack:
    """A stack whose blocks are permuted (scaled, noisy) copies of templates."""
    torch.manual_seed(seed)
    templates = [Block() for _ in range(max(which) + 1)]
    model = Stack(len(which), act).eval()
    with torch.no_grad():
        for block, number in zip(model.blocks, which, strict=True):
            template = templates[number]
            order = torch.randperm(HIDDEN) if permute else torch.arange(HIDDEN)
            factor = torch.rand(HIDDEN) + 0.5 if scale else torch.ones(HIDDEN)
            block.up.weight.copy_((template.up.weight * factor[:, None])[order])
            block.up.bias.copy_((template.up.bias * factor)[order])
            block.down.weight.copy_((template.down.weight / factor)[:, order])
            block.down.bias.copy_(template.down.bias)
            for tensor in block.parameters():
                tensor.add_(noise * torch.randn_like(tensor))
    return model


def program_of(model: nn.Module, rows: int = 32) -> tuple[Program, Tensor]:
    """The program and its example input."""
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))
    return tl.capture(model.eval(), (x,)), x


@functools.cache
def planted_program(noise: float = 0.0, scale: bool = False) -> tuple[Program, Tensor]:
    """The program of `planted`, captured once per process: passes run on copies of it."""
    return program_of(planted(noise=noise, scale=scale))
