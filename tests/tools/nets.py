"""Models that tests name on a command line."""

import torch
from torch import nn

MODULE = nn.Linear(3, 3)
NUMBER = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y if scale is None else y * scale


def module() -> nn.Module:
    return Net()


def pair() -> tuple[nn.Module, tuple[torch.Tensor]]:
    x = torch.randn(4, 16)
    return Net(), (x,)


def triple() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, torch.Tensor]]:
    return Net(), (torch.randn(4, 16),), {"scale": torch.tensor(2.0)}


def failing() -> nn.Module:
    raise ValueError("no weights here")


def number() -> int:
    return 3


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


def branch() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return Branch(), (torch.randn(4, 16),)
