"""The measured error of families whose erasing is only approximate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.test_families import Net
from torchlathe.ir import Program, UnsupportedError
from torchlathe.passes import PassManager, ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.measuring import error_notes, measured_error

WIDTH = 6


def program_of(device: str = "cpu") -> Program:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(m.middle(m.enter(x)).softmax(-1))

    model = Net(run, enter=nn.Linear(4, WIDTH), middle=nn.Linear(WIDTH, WIDTH),
                leave=nn.Linear(WIDTH, 3))  # fmt: skip
    x = torch.randn(5, 4, dtype=torch.float64)
    return tl.capture(model.double().eval().to(device), (x.to(device),))


def test_the_error_of_a_family() -> None:
    program = program_of()
    families = program.analysis(ZeroInvariantGroups)
    inexact = families.by_name("middle.weight:0")
    assert inexact.exactness == "approximate"
    units = torch.tensor([1, 4])
    found = measured_error(program, inexact, units)
    # Two of six logits are left out of the softmax, which moves the others by shares of them.
    assert 1e-3 < found.relative < 1
    assert found.absolute > 0
    # By hand: the same two models.
    x = program.example_inputs[0][0]
    w = {name: entry.tensor.detach() for name, entry in program.entries.items()}
    logits = (x @ w["enter.weight"].T + w["enter.bias"]) @ w["middle.weight"].T + w["middle.bias"]
    stays = [0, 2, 3, 5]
    erased = logits[:, stays].softmax(-1) @ w["leave.weight"][:, stays].T + w["leave.bias"]
    logits[:, units] = 0
    zeroed = logits.softmax(-1) @ w["leave.weight"].T + w["leave.bias"]
    difference = (erased - zeroed).abs().max()
    assert found.absolute == pytest.approx(float(difference), rel=1e-9)
    assert found.relative == pytest.approx(float(difference / zeroed.abs().max()), rel=1e-9)
    # Exact ones are exact, and nothing was changed.
    exact = families.by_name("enter.weight:0")
    assert measured_error(program, exact, units).relative < 1e-12
    assert program.entries["middle.weight"].tensor.shape == (WIDTH, WIDTH)


def test_the_pass_tells_it() -> None:
    program = program_of()
    spec = "structured-erase{sparsity=0.5,approximate=true}"
    after = PassManager(spec).run(program)
    record = after.history[-1]
    assert record.exactness == "approximate"
    notes = [d for d in record.diagnostics if d["name"] == "middle.weight:0"]
    assert len(notes) == 1
    assert "of the largest output, on the example inputs (every index" in notes[0]["message"]
    assert 0 < record.verification["max_rel_error"] < 1


def test_no_values_no_error() -> None:
    program = program_of("meta")
    families = program.analysis(ZeroInvariantGroups)
    units = {f: torch.tensor([0]) for f in families.prunable}
    assert list(error_notes(program, units)) == []
    with pytest.raises(UnsupportedError):
        measured_error(program, families.by_name("middle.weight:0"), torch.tensor([0]))
