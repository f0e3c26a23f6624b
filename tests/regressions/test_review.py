"""Models that broke the column once, found by review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchlathe as tl
from torchlathe.passes import StructuredErase, ZeroInvariantGroups

ERASE = "structured-erase{sparsity=0.5}"


def compiled(model: nn.Module, x: Tensor, passes: Any = ERASE) -> tl.CompiledModel:
    return tl.compile(model, passes, (x,), dynamic_shapes="auto", measure_latency=False)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check_twin(model: nn.Module, small: tl.CompiledModel, x: Tensor) -> None:
    for example in (x, x.flip(0)[:1], torch.cat([x, -x])):
        want = small.zeroed_reference(model)(example)
        torch.testing.assert_close(small(example), want, rtol=1e-9, atol=1e-9)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.sigmoid(self.enter(x)).to(self.dtype).to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_constants_are_cast_with_the_channels_that_hold_them(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Cast(dtype).double().eval(), inputs(3, 6)
    small = compiled(model, x)
    assert small.get_parameter("enter.weight").shape[0] < 8
    check_twin(model, small, x)


class Folded(nn.Module):
    """Erasing ``enter`` gives ``middle`` a bias that the original has not."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle = nn.Linear(6, 8), nn.Linear(8, 8, bias=False)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.middle(torch.sigmoid(self.enter(x)))))


def test_a_folded_bias_is_erased_in_turn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Folded().double().eval(), inputs(3, 6)
    first = compiled(model, x, StructuredErase(sparsity={"enter.weight:0": 0.5}))
    assert "middle.bias" in first.state_dict()
    first.save(tmp_path / "first.lathe")
    loaded = tl.load(tmp_path / "first.lathe")
    second = compiled(loaded, x, StructuredErase(sparsity={"middle.weight:0": 0.5}))
    assert second.get_parameter("middle.weight").shape == (4, 4)
    check_twin(model, second, x)


class PlainTensor(nn.Module):
    """A tensor that is neither parameter nor buffer, and so has no name to zero it by."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)
        self.table = torch.linspace(1, 2, 8, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.middle(self.enter(x) + self.table)))


def test_plain_tensors_are_not_zeroed() -> None:
    torch.manual_seed(0)
    model, x = PlainTensor().double().eval(), inputs(3, 6)
    families = tl.capture(model, x).analysis(ZeroInvariantGroups)
    family = families.by_name("enter.weight:0")
    # The caller has no name under which to zero the tensor, but what reads the sum it has.
    assert (family.exactness, family.zeroed_by) == ("exact", "readers")
    check_twin(model, compiled(model, x), x)


class EmptySlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.softmax(self.enter(x), -1)
        return self.leave(torch.cat([self.middle(x), x[:, :0]], 1).exp())


@pytest.mark.parametrize("scope", ["local", "global"])
def test_axes_without_indices_are_no_family(scope: str) -> None:
    torch.manual_seed(0)
    model, x = EmptySlice().double().eval(), inputs(3, 6)
    families = tl.capture(model, x).analysis(ZeroInvariantGroups)
    assert all(family.extent > 0 for family in families)
    check_twin(model, compiled(model, x, f"structured-erase{{scope={scope}}}"), x)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.leave = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.enter(x).permute(0, 2, 3, 1))
        return self.leave(x.view(x.shape[0], -1))  # the fused norm gives contiguous results


def test_a_corrected_norm_can_be_viewed() -> None:
    torch.manual_seed(0)
    model, x = ChannelsLast().double().eval(), inputs(2, 3, 4, 4)
    small = compiled(model, x)
    assert small.get_parameter("enter.weight").shape[0] < 8
    check_twin(model, small, x)


class TransposedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.leave = nn.Parameter(torch.randn(6, 8).t()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.weight.t().view(2, 24)).view(-1, 3, 8)
        return self.leave(torch.relu(x))


def test_parameters_keep_the_order_of_their_axes_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = TransposedParameter().double().eval(), inputs(3, 2)
    small = compiled(model, x)
    assert small.get_parameter("weight").shape[0] < 8
    check_twin(model, small, x)
    small.save(tmp_path / "model.lathe")
    check_twin(model, tl.load(tmp_path / "model.lathe"), x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.enter(x)))


def test_refusals_are_errors_of_the_package() -> None:
    model, x = Mlp().eval(), torch.randn(2, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for error, call in [
        ("keep_at_least", lambda: StructuredErase(keep_at_least=float("inf"))),
        ("passes", lambda: tl.compile(model, 3, (x,))),  # type: ignore[arg-type]
        ("passes", lambda: tl.compile(model, None, (x,))),  # type: ignore[arg-type]
        ("calibration", lambda: tl.compile(model, ERASE, (x,), calibration=3)),  # type: ignore[arg-type]
        ("dtype", lambda: tl.compile(model, ERASE, (x.double(),), measure_latency=False)),
        ("TorchScript", lambda: compiled(torch.jit.trace(model, x), x)),
    ]:
        with pytest.raises(tl.Error, match=error):
            call()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_no_zeroed_twin_of_a_model_with_rewritten_values() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 4)
    program = tl.capture(model, x)
    with program.edit() as edit:
        edit.set_tensor("0.weight", program.tensor("0.weight").detach() * 2)
    compiled = tl.compile(program, "structured-erase", measure_latency=False)
    with pytest.raises(tl.Error, match=r"new values to 0\.weight"):
        compiled.zeroed_reference(model)
    again = tl.compile(tl.capture(compiled, x), "structured-erase", measure_latency=False)
    torch.testing.assert_close(again(x), again.zeroed_reference(compiled)(x))
