"""Which tensors can take the scales of a value's channels, and which only look as if they could."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.quantising.folds import find_folds

WIDTH = 16  # of channels, and the number of tokens: extents never tell the two apart


class Reader(nn.Module):
    """A linear layer that reads what one of many writers gives, perhaps through others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.vector = nn.Parameter(torch.rand(WIDTH) + 0.1)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.linear, self.reader = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def value(self, x: torch.Tensor, kind: str) -> torch.Tensor:
        through, _, writer = kind.partition(" of ")
        if writer:
            y = self.value(x, writer)
            return {
                "transpose": lambda: y.transpose(1, 2),
                "attention": lambda: F.scaled_dot_product_attention(x, x, y),
                "attention, keys too,": lambda: F.scaled_dot_product_attention(x, y, y),
                "square": lambda: y * y,
            }[through]()
        return {
            "a vector": lambda: x * self.vector,
            "a norm": lambda: self.norm(x),
            "an RMSNorm": lambda: self.rms(x),
            "a linear layer": lambda: self.linear(x),
            "addmm": lambda: torch.addmm(self.linear.bias, x[0], self.linear.weight).view(x.shape),
            "addmm with a matrix": lambda: torch.addmm(self.matrix, x[0], self.linear.weight).view(
                x.shape
            ),
        }[through]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.value(x, self.kind))


class Summed(Reader):
    """Adds channels to tokens besides, so that the two have one term."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x + x.transpose(1, 2)


WRITERS = {
    "a vector": {"vector": 0},
    "a norm": {"norm.weight": 0, "norm.bias": 0},
    "an RMSNorm": {"rms.weight": 0},
    "a linear layer": {"linear.weight": 0, "linear.bias": 0},
    "addmm": {"linear.bias": 0, "linear.weight": 1},
}


def check(kind: str, writers: list[dict[str, int]], model: type[Reader] = Reader) -> None:
    """What is divided for a value is this; and balancing it is accepted as exact."""
    torch.manual_seed(0)
    reader, x = model(kind).eval(), torch.randn(1, WIDTH, WIDTH)
    x[:, ::5] *= 50
    program = capture(reader, (x,))
    folds = find_folds(program, find_sites(program)[0])
    found = [dict(fold.writers) for fold in folds if fold.sites[0].weight == "reader.weight"]
    assert found == writers
    after = PassManager("quantize{balance=smoothquant}").run(program, calibration=[x])
    with torch.no_grad():
        before, now = reader(x), after.run(x)
    assert (now - before).norm() < 0.03 * before.norm()


@pytest.mark.parametrize("through", ["", "attention of ", "transpose of transpose of "])
@pytest.mark.parametrize("writer", WRITERS)
def test_channels_take_scales(through: str, writer: str) -> None:
    check(through + writer, [WRITERS[writer]])


@pytest.mark.parametrize("through", ["transpose of ", "transpose of attention of "])
@pytest.mark.parametrize("writer", WRITERS)
def test_as_many_tokens_are_no_channels(through: str, writer: str) -> None:
    check(through + writer, [])


@pytest.mark.parametrize("writer", WRITERS)
def test_channels_that_have_one_term_with_tokens(writer: str) -> None:
    check(f"transpose of {writer}", [], Summed)


@pytest.mark.parametrize(
    "kind", ["square of a linear layer", "attention, keys too, of a norm", "addmm with a matrix"]
)
def test_what_is_read_twice_or_by_rows_takes_none(kind: str) -> None:
    check(kind, [])
