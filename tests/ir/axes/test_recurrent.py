"""Recurrent layers and cells: their hidden units are families, and erasing them is exact."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ir.axes.between import check_between, families_of
from tests.zoo.oracle import captured
from tests.zoo.zoo_model import ZooModel, sequences, vectors

LAYERS: dict[str, Any] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
CELLS: dict[str, Any] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "tanh": nn.RNNCell}
STEPS = {
    **sequences(3),
    "sizes": ((2, 4), (3, 4)),
    "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},),
}


class Between(nn.Module):
    """A recurrent network between two linear layers; its state begins at zero."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.first = options.get("batch_first", False)
        self.before = nn.Linear(3, 5)
        self.net = LAYERS[kind](5, 6, **options)
        width = options.get("proj_size") or 6
        self.after = nn.Linear(width * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.before(x))
        if self.first:
            return self.after(self.net(x)[0])
        return self.after(self.net(x.transpose(0, 1))[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lstm", {"batch_first": True}),
        ("lstm", {"num_layers": 2, "bidirectional": True}),
        ("lstm", {"num_layers": 2, "proj_size": 4, "batch_first": True}),
        ("gru", {"bidirectional": True, "bias": False, "batch_first": True}),
        ("gru", {"num_layers": 2}),
        ("tanh", {"num_layers": 2, "batch_first": True}),
        ("relu", {"bias": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_hidden_units_are_exact(kind: str, options: dict[str, Any]) -> None:
    hidden = "net.weight_ih_l0:0" + ("/1" if kind in ("lstm", "gru") else "")
    free = {"before.weight:0": "exact", hidden: "exact"}
    case = check_between(functools.partial(Between, kind, **options), STEPS, free=free)
    last = options.get("num_layers", 1) - 1
    owned = {(s.name, s.axis) for s in families_of(case).by_name(hidden).slices}
    assert (f"net.weight_hh_l{last}", 0) in owned
    if "proj_size" in options:
        family = families_of(case).by_name("net.weight_hr_l0:0")
        assert family.exactness == "exact"
        owned = {(s.name, s.axis) for s in family.slices}
    assert ("after.weight", 1) in owned


class Cells(nn.Module):
    """A cell, unrolled over three steps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.before = nn.Linear(3, 5)
        self.cell = CELLS[kind](5, 6)
        self.after = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        x = torch.relu(self.before(x))
        for _ in range(3):
            state = self.cell(x, state)
        return self.after(state[0] if self.kind == "lstm" else state)


@pytest.mark.parametrize("kind", sorted(CELLS))
def test_units_of_cells_are_exact(kind: str) -> None:
    units = "cell.weight_ih:0" + ("" if kind == "tanh" else "/1")
    free = {"before.weight:0": "exact", units: "exact"}
    check_between(functools.partial(Cells, kind), vectors(3), free=free)


class Learnt(nn.Module):
    """A state that begins at a parameter."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.net = nn.GRU(3, 6, batch_first=True)
        self.start = nn.Parameter(torch.randn(1, 1, 6))
        self.shift = start
        self.after = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = (self.start + self.shift).expand(1, x.shape[0], 6).contiguous()
        return self.after(self.net(x, state)[0])


def test_a_learnt_state_is_a_writer() -> None:
    check_between(functools.partial(Learnt, 0.0), STEPS, free={"start:2": "exact"})


def test_a_state_that_does_not_begin_at_zero_is_told() -> None:
    case = captured(ZooModel("learnt", functools.partial(Learnt, 1.0), **STEPS), torch.float64)
    family = families_of(case).by_name("start:2")
    assert family.exactness == "approximate"
    assert "its state is not zero at the erased units" in family.reasons[0]


class Shifted(nn.Module):
    """Inputs of a recurrent network that are one half where their writer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 5)
        self.net = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.before(x).sigmoid())[1][0].sum(-1)


def test_inputs_that_are_not_zero_are_told() -> None:
    case = captured(ZooModel("shifted", Shifted, **STEPS), torch.float64)
    family = families_of(case).by_name("before.weight:0")
    assert family.exactness == "approximate"
    assert "its inputs are not zero at the erased indices" in family.reasons[0]


class Residual(nn.Module):
    """Inputs and hidden units are one family."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(3, 6)
        self.net = nn.GRU(6, 6, num_layers=2, batch_first=True)
        self.after = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + self.net(x)[0])


def test_residual_streams_through_a_recurrent_network() -> None:
    check_between(Residual, STEPS, free={"before.weight:0": "exact"})
