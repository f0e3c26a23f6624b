"""Deep networks of any size, to see how cost grows with the number of nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["NETS", "Net"]


class Residual(nn.Module):
    """Convolutions with batch norm on one residual stream, 7 nodes a block."""

    def __init__(self, blocks: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(self._block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _block(width: int) -> nn.Module:
        first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention with a fused projection, and an MLP, before norms; 18 nodes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to the same."""
        b, n, w = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, w // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, w))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Such layers on one residual stream."""

    def __init__(self, layers: int, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length, 8) to logits per position."""
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


class Dense(nn.Module):
    """Dense blocks: each layer reads the outputs of all layers of its block, end to end."""

    def __init__(self, blocks: int, layers: int, growth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(self._layer(width + i * growth, growth) for i in range(layers))
            for _ in range(blocks)
        )
        self.transitions = nn.ModuleList(
            nn.Conv2d(width + layers * growth, width, 1) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    @staticmethod
    def _layer(width: int, growth: int) -> nn.Module:
        convolution = nn.Conv2d(width, growth, 3, padding=1)
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), convolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        x = self.stem(x)
        for layers, transition in zip(self.blocks, self.transitions, strict=True):
            found = [x]
            for layer in layers:  # type: ignore[attr-defined]
                found.append(layer(torch.cat(found, 1)))
            x = transition(torch.cat(found, 1))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Net:
    """A family of networks.

    Attributes:
        name: Of the row.
        about: For the page.
        nodes: Sizes to measure, about.
        make: Makes a network of about so many nodes, with an input.
    """

    name: str
    about: str
    nodes: tuple[int, ...]
    make: Callable[[int], tuple[nn.Module, torch.Tensor]]


_SIZES = (300, 1000, 3000, 8000, 20000)


def _images() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4)


def _residual(nodes: int) -> tuple[nn.Module, torch.Tensor]:
    return Residual(max(1, nodes // 7)), _images()


def _transformer(nodes: int) -> tuple[nn.Module, torch.Tensor]:
    return Transformer(max(1, nodes // 18)), torch.randn(2, 4, 8)


def _dense(nodes: int) -> tuple[nn.Module, torch.Tensor]:
    return Dense(max(1, nodes // 26), layers=6), _images()


def _one_block(nodes: int) -> tuple[nn.Module, torch.Tensor]:
    return Dense(1, layers=max(2, nodes // 4)), _images()


NETS = {
    net.name: net
    for net in (
        Net("residual", "convolutions on one residual stream", _SIZES, _residual),
        Net("transformer", "fused attention and MLP on one stream", _SIZES, _transformer),
        Net("dense", "dense blocks of six layers", _SIZES, _dense),
        Net(
            "one dense block",
            "one dense block of all layers; its edges grow with the square of its nodes",
            (100, 200, 400, 800),
            _one_block,
        ),
    )
}
