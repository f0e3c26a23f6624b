"""Sweeps of weights that several calls read: by what all of them read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.sweeping.calls import readers_of_sites
from torchlathe.passes.statistics.arriving import arrivals
from torchlathe.passes.statistics.later import LaterCalls


class Two(nn.Module):
    """One layer for two inputs that excite other directions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), self.layer(y)


class Around(nn.Module):
    """A layer that is called again behind another one."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.between = nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.shared(x))
        x = torch.relu(self.between(x))
        return self.last(torch.relu(self.shared(x)))


class Experts(nn.Module):
    """Three experts, called twice with other rows and other ends."""

    ends: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 32) / 6)
        self.register_buffer("ends", torch.tensor([10, 44, 64], dtype=torch.int32))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.tensor([20, 50, 64], dtype=torch.int32)
        weight = self.weight.transpose(1, 2)
        return F.grouped_mm(x, weight, offs=first), F.grouped_mm(y, weight, offs=self.ends)


def two(layer: nn.Module | None = None, ins: int = 64) -> tuple[Program, list[Any]]:
    torch.manual_seed(0)
    model = Two(layer or nn.Linear(ins, 48)).eval()
    strong, weak = torch.logspace(0, -3, ins), torch.logspace(-3, 0, ins)
    mixes = [torch.linalg.qr(torch.randn(ins, ins))[0] for _ in range(2)]
    data = [
        tuple(torch.randn(200, ins) * size @ mix
              for size, mix in zip((strong, weak), mixes, strict=True))
        for _ in range(3)
    ]  # fmt: skip
    return capture(model, data[0]), data


def errors_of(program: Program, after: Program, data: list[Any]) -> list[float]:
    """Relative squared errors: of each output, and of all together."""
    lost, whole = [0.0, 0.0], [0.0, 0.0]
    for batch in data:
        pairs = zip(program.run(*batch), after.run(*batch), strict=True)
        for call, (old, new) in enumerate(pairs):
            lost[call] += float((new - old).double().square().sum())
            whole[call] += float(old.double().square().sum())
    return [*(a / b for a, b in zip(lost, whole, strict=True)), sum(lost) / sum(whole)]


@torch.no_grad()
def test_gptq_serves_every_call() -> None:
    program, data = two(nn.Linear(64, 48, bias=False))
    spec = "quantize{{scheme=w4a16,group=32,method={}}}"
    nearest, swept = (
        PassManager(spec.format(method)).run(program, calibration=data)
        for method in ("rtn", "gptq")
    )
    before, after = errors_of(program, nearest, data), errors_of(program, swept, data)
    assert all(new < old for new, old in zip(after, before, strict=True))
    (row,) = swept.history[-1].details["quantised"]
    # Both calls read inputs of the model, so that what is told is what there is.
    assert row["output_error"] == pytest.approx(after[2], rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_zeros_are_chosen_for_every_call(method: str) -> None:
    program, data = two(nn.Linear(64, 48, bias=False))
    after, plain = (
        PassManager(f"sparsify-nm{{method={name}}}").run(program, calibration=data)
        for name in (method, "magnitude")
    )
    found, before = errors_of(program, after, data), errors_of(program, plain, data)
    (row,) = after.history[-1].details["sparse"]
    assert row["error"] == pytest.approx(found[2], rel=1e-4)
    assert row["error_magnitude"] == pytest.approx(before[2], rel=1e-4)
    assert all(new < old for new, old in zip(found, before, strict=True))


def _layer(name: str) -> tuple[nn.Module, list[Any]]:
    generator = torch.Generator().manual_seed(1)
    shape = {"linear": (2, 9, 32), "convolution": (2, 32, 7, 7), "experts": (64, 32)}[name]
    data = [tuple(torch.randn(shape, generator=generator) for _ in range(2)) for _ in range(3)]
    if name == "experts":  # grouped products are for bf16
        return Experts().bfloat16(), [tuple(x.bfloat16() for x in batch) for batch in data]
    convolution = nn.Conv2d(32, 16, 3, groups=2, stride=2, padding=1)
    return Two(nn.Linear(32, 16) if name == "linear" else convolution), data


@pytest.mark.parametrize("name", ["linear", "convolution", "experts"])
def test_moments_are_those_of_all_rows(name: str) -> None:
    torch.manual_seed(0)
    model, data = _layer(name)
    program = capture(model.eval(), data[0])
    (known,) = readers_of_sites(program, find_sites(program)[0]).values()
    assert len(known) == 2
    later = LaterCalls(program, {"weight": known[1:]})
    batches = [list(batch) for batch in data]
    first, second = arrivals(program, batches, known)
    both = later.joined("weight", first, batches)
    assert both.counts == tuple(a + b for a, b in zip(first.counts, second.counts, strict=True))
    assert len(both.moments) == {"linear": 1, "convolution": 2, "experts": 3}[name]
    for group, moment in enumerate(both.moments):
        wanted = first.moments[group] * first.counts[group]
        wanted = wanted + second.moments[group] * second.counts[group]
        torch.testing.assert_close(moment, wanted / both.counts[group])
    # Of another parameter nothing is known.
    assert later.joined("another", first, batches) is first


def test_only_a_second_call_needs_a_copy() -> None:
    program = capture(nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
    assert LaterCalls(program, {"weight": []}).program is None


def test_a_layer_that_is_called_again_goes_on_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Around().eval()
    data = [torch.randn(60, 32) for _ in range(3)]
    spec = f'quantize{{scheme=w4a16,group=16,method=gptq,checkpoint="{tmp_path}"}}'

    def run() -> Program:
        program = capture(model, (data[0],))
        return PassManager(spec, verify=False).run(program, calibration=data)

    first = run()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    files[-1].unlink()
    second = run()
    assert second.history[-1].statistics["resumed"] == 2
    for name, entry in first.entries.items():
        assert torch.equal(entry.tensor, second.entries[name].tensor)
    # The layer in between comes later, but it makes what the second call reads.
    with torch.no_grad():
        model.between.weight.mul_(1.5)
    assert run().history[-1].statistics["resumed"] == 0
