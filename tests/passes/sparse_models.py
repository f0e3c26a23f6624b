"""Models, data and a loop for the tests of sparse training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.analysis.families import Families


class Mlp(nn.Module):
    """Two families: a residual stream of 12 and a hidden layer of 20."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        result: Tensor = self.head(self.norm(x))
        return result


class Deep(nn.Module):
    """Four branches beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        result: Tensor = self.head(x)
        return result


class Concat(nn.Module):
    """Two convolutions of which a batch norm sees the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        result: Tensor = self.head(torch.relu(y).mean((2, 3)))
        return result


class ConvNet(nn.Module):
    """A stem and a residual block with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def classifier(count: int) -> tuple[tl.Program, list[Any]]:
    """A small classifier, and so many batches of eight with labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x, y = torch.randn(8 * count, 6), torch.randint(0, 4, (8 * count,))
    found = list(zip(x.split(8), y.split(8), strict=True))
    return tl.capture(model, (found[0][0],), dynamic_shapes="auto"), found


def groups_of(model: nn.Module, *inputs: Tensor) -> Families:
    """The families of a model, captured in eval mode."""
    training = model.training
    found = tl.capture(model.eval(), inputs).analysis(ZeroInvariantGroups)
    model.train(training)
    return found


def batches(
    shape: tuple[int, ...], seed: int = 0, **options: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random inputs and labels of 4 classes, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(shape, generator=generator, **options)
        yield x, torch.randint(0, 4, shape[:1], generator=generator)


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """So many steps."""
    for _ in range(steps):
        x, y = next(data)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss.detach())  # type: ignore[call-overload]
