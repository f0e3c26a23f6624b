"""Data sets that scikit-learn brings along, split by a seed, and networks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["TASKS", "Cnn", "Mlp", "Split", "Task", "size", "split", "width_for"]

_TEST = 0.36


@dataclass(frozen=True)
class Split:
    """Samples to train on and others to test on.

    Attributes:
        train: Inputs (n, ...) and labels (n,).
        test: Likewise; in no training.
        classes: How many.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


class Mlp(nn.Module):
    """Three hidden layers of one width, in numbered blocks, and a linear head."""

    def __init__(self, ins: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [ins, width, width]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(before, width), nn.ReLU()) for before in widths
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, ins)."""
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.head(x)
        return result


class Cnn(nn.Module):
    """A stem, three residual blocks of a convolution and batch norm, and a linear head."""

    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, 1, 8, 8)."""
        x = torch.relu(self.stem(x))
        for index, block in enumerate(self.blocks):
            x = x + block(x)
            if index == 0:
                x = nn.functional.max_pool2d(x, 2)
        result: Tensor = self.head(x.mean((2, 3)))
        return result


@dataclass(frozen=True)
class Task:
    """A data set and a family of networks.

    Attributes:
        name: Of the data set.
        make: The untrained net of a width, for so many features and classes.
        width: Of the teacher.
        images: Whether samples are images.
        steps: Of each training, of the teacher too.
        rate: Highest learning rate, likewise. Both were chosen for students that learn alone, on a
            split that is not measured.
    """

    name: str
    make: Callable[[int, int, int], nn.Module]
    width: int
    steps: int
    rate: float = 1e-2
    images: bool = False

    def net(self, width: int) -> nn.Module:
        """An untrained net."""
        data = split(self, 0)
        return self.make(data.train[0].shape[1], width, data.classes)


TASKS: Final = {
    "digits, CNN": Task(
        "digits", lambda _, width, classes: Cnn(width, classes), 24, 300, 3e-2, images=True
    ),
    "digits, features": Task("digits", Mlp, 96, 300),
    "breast cancer": Task("breast_cancer", Mlp, 96, 100),
    "wine": Task("wine", Mlp, 96, 100),
    "iris": Task("iris", Mlp, 96, 100),
}


@cache
def _loaded(name: str) -> tuple[Tensor, Tensor]:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    return torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)


def split(task: Task, seed: int) -> Split:
    """Of every 100 samples 36 to test on; features have mean 0 and deviation 1 in training."""
    samples, labels = _loaded(task.name)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1000 + seed))
    count = round(len(labels) * (1 - _TEST))
    samples, labels = samples[order], labels[order]
    if task.images:
        samples = samples.reshape(-1, 1, 8, 8) / 16
    else:
        mean, deviation = samples[:count].mean(0), samples[:count].std(0)
        samples = (samples - mean) / torch.where(deviation > 0, deviation, 1.0)
    return Split(
        (samples[:count], labels[:count]),
        (samples[count:], labels[count:]),
        int(labels.max()) + 1,
    )


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def width_for(task: Task, parameters: float) -> int:
    """The largest width whose net has at most so many parameters; at least 2."""
    width = 2
    while size(task.net(width + 1)) <= parameters:
        width += 1
    return width
