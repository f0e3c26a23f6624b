"""Erasing what is zero already: which units that is, and how many of them go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.passes.test_structured_erase import (
    Attention,
    Conv,
    Mlp,
    count,
    erase,
    kept,
    outputs,
    program_of,
)
from torchlathe.ir import Program


@pytest.fixture
def mlp() -> Program:
    return program_of(Mlp(), torch.randn(4, 6))


def zero_units(model: nn.Module, inputs: Tensor, share: float) -> Program:
    """A program in which the lowest units of its exact families have been zeroed by hand."""
    before = program_of(model, inputs)
    erased = erase(before, sparsity=share)
    with torch.no_grad():
        for name, axes in erased.zeroed.items():
            for axis, indices in axes.items():
                before.entries[name].tensor.index_fill_(axis, indices, 0)
    return before


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Mlp, (4, 6)),
        (lambda: Mlp(nn.RMSNorm), (4, 6)),
        (Conv, (2, 3, 8, 8)),
        (Attention, (2, 3, 8)),
    ],
    ids=["layer-norm", "rms-norm", "conv", "attention"],
)
def test_zeros_are_erased_exactly(make: Any, shape: tuple[int, ...]) -> None:
    program = zero_units(make().double(), torch.randn(shape).double(), 0.5)
    after = erase(program, zeros=True)
    assert count(after) < 0.8 * count(program)
    want = program.run(*program.example_inputs[0]).detach()
    got = after.run(*after.example_inputs[0]).detach()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))
    assert not erase(after, zeros=True).history[-1].changed


def test_zeros_erases_nothing_else(mlp: Program) -> None:
    with torch.no_grad():
        mlp.entries["up.weight"].tensor[4] = 0  # the bias of unit 4 is not zero
        mlp.entries["up.weight"].tensor[9] = 0
        mlp.entries["up.bias"].tensor[9] = 0
    after = erase(mlp, zeros=True)
    assert kept(after)["up.weight"] == {0: [i for i in range(20) if i != 9]}


class Normed(nn.Module):
    """Convolutions with batch norms, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.stem(x)))
        x = x + torch.relu(self.second(self.conv(x)))
        return self.head((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))


def same_outputs(before: Program, after: Program) -> bool:
    want, got = outputs(before), outputs(after)
    return bool((want - got).abs().max() <= 1e-12 * want.abs().max())


def test_zeros_behind_a_batch_norm() -> None:
    model = Normed()
    with torch.no_grad():
        # The convolutions are not zero, but what comes out of the norms is; and nothing else
        # writes to the stream.
        for tensor in (*model.first.parameters(), *model.second.parameters()):
            tensor[[1, 6]] = 0
        model.outer.weight[[1, 6]] = 0
        model.outer.get_parameter("bias")[[1, 6]] = 0
    before = program_of(model, torch.randn(2, 3, 6, 6))
    after = erase(before, zeros=True)
    assert kept(after)["stem.weight"] == {0: [0, 2, 3, 4, 5, 7]}
    assert same_outputs(before, after)
    assert after.history[-1].verification["passed"]


def test_zeros_that_nobody_reads() -> None:
    model = Normed()
    with torch.no_grad():
        model.outer.weight[:, [3, 4, 9]] = 0
        model.outer.weight[:, 5] = 0
        model.inner.weight[7] = 0  # holds its bias, which is read
    before = program_of(model, torch.randn(2, 3, 6, 6))
    after = erase(before, zeros=True)
    assert kept(after)["inner.weight"] == {0: [0, 1, 2, 6, 7, 8, 10, 11]}
    assert same_outputs(before, after)


def test_one_writer_that_is_not_zero_keeps_a_unit() -> None:
    model = Normed()
    with torch.no_grad():
        for tensor in (*model.first.parameters(), *model.second.parameters()):
            tensor[[1, 6]] = 0
        model.outer.get_parameter("bias")[[1, 6]] = 0  # its weight still writes to the stream
    before = program_of(model, torch.randn(2, 3, 6, 6))
    assert not erase(before, zeros=True).history[-1].changed


def test_zeros_behind_a_sigmoid_are_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.norm(self.a(x))))

    model = Net().double()
    with torch.no_grad():
        for tensor in model.norm.parameters():
            tensor[2] = 0
    before = program_of(model, torch.randn(3, 4).double())
    after = erase(before, zeros=True)
    assert kept(after)["a.weight"] == {0: [0, 1, 3, 4, 5]}
    assert same_outputs(before, after)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"round_to": 8}, 16),
        ({"round_to": 4}, 16),
        ({"keep_at_least": 0.9}, 18),
        ({"keep_at_least": 19}, 19),
        ({}, 15),
    ],
    ids=str,
)
def test_zeros_honours_floors_and_round_numbers(
    mlp: Program, options: dict[str, Any], left: int
) -> None:
    with torch.no_grad():
        for name in ("up.weight", "up.bias"):
            mlp.entries[name].tensor[[2, 3, 11, 12, 19]] = 0
    after = erase(mlp, zeros=True, **options)
    assert after.parameters["up.weight"].shape == (left, 12)
    want = outputs(mlp)
    torch.testing.assert_close(outputs(after), want, rtol=1e-12, atol=1e-12)


def test_zeros_leaves_one_unit(mlp: Program) -> None:
    with torch.no_grad():
        mlp.entries["up.weight"].tensor.zero_()
        mlp.entries["up.bias"].tensor.zero_()
    after = erase(mlp, zeros=True)
    assert after.parameters["up.weight"].shape == (1, 12)
