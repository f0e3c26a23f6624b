"""Two passes in a row that once disagreed with the twin, found by review."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchlathe as tl
from torchlathe.ir import OptionError
from torchlathe.passes import EraseOperators


class Net(nn.Module):
    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)
        for parameter in self.parameters():
            nn.init.normal_(parameter, mean=0.2)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def erase(tensor: str) -> str:
    return f'structured-erase{{sparsity=0.4,include=["{tensor}:0"]}}'


def check(model: nn.Module, passes: str, x: Tensor) -> tl.CompiledModel:
    """The twin comes from the original, and not from the program between the passes."""
    small = tl.compile(model.double().eval(), passes, (x,), measure_latency=False)
    twin = small.zeroed_reference(model)
    for example in (x, -2 * x):
        torch.testing.assert_close(small(example), twin(example), rtol=1e-12, atol=1e-12)
    assert all(record.exactness == "exact" for record in small.program.history)
    return small


def scaled(m: Any, x: Tensor) -> Tensor:
    """Columns behind the relu have zeroed writers, those behind the sigmoid zeros themselves."""
    w = m.weight / (m.weight.std((1, 2, 3), keepdim=True) + 1e-3)
    both = torch.cat([m.one(x).relu(), m.two(x).sigmoid()], 1)
    return m.leave(F.conv2d(both, w, m.bias, padding=1).relu())


def scaled_net() -> nn.Module:
    torch.manual_seed(0)
    return Net(scaled, one=nn.Conv2d(3, 5, 1), two=nn.Conv2d(3, 5, 1), leave=nn.Conv2d(6, 2, 1),
               weight=nn.Parameter(torch.empty(6, 10, 3, 3)),
               bias=nn.Parameter(torch.empty(6)))  # fmt: skip


def test_columns_stay_once_a_constant_was_computed_from_them(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = scaled_net()
    first = check(model, erase("one.weight"), x)
    assert first.program.frozen == {"weight": frozenset({1, 2, 3})}
    first.save(tmp_path / "first.lathe")
    loaded = tl.load(tmp_path / "first.lathe")
    assert loaded.program.frozen == first.program.frozen
    again = tl.compile(loaded, erase("two.weight"), (x,), measure_latency=False)
    assert not again.program.history[-1].changed
    # Rows of the constant go with the rows of the weight, and the other order is exact as well.
    assert check(model, f"{erase('one.weight')},{erase('weight')}", x).program.history[-1].changed
    assert check(model, f"{erase('two.weight')},{erase('one.weight')}", x).program.frozen


def test_steps_stop_at_frozen_columns() -> None:
    torch.manual_seed(0)
    check(scaled_net(), "structured-erase{steps=3}", torch.randn(2, 3, 4, 4, dtype=torch.float64))


def shared_bias(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    folded = F.linear(m.enter(x).sigmoid(), m.one, m.bias).relu()
    return folded @ m.end, F.linear(x, m.two, m.bias).relu() @ m.end.exp()


def read_bias(m: Any, x: Tensor) -> Tensor:
    return F.linear(m.enter(x).sigmoid(), m.one, m.bias).relu() @ m.end * m.bias.std()


@pytest.mark.parametrize("run", [shared_bias, read_bias])
def test_a_bias_that_others_read_keeps_its_name_when_a_constant_is_added(run: Any) -> None:
    torch.manual_seed(0)
    shapes = {"one": (8, 8), "two": (8, 6), "bias": (8,), "end": (8, 3)}
    parts = {n: nn.Parameter(torch.empty(shape)) for n, shape in shapes.items()}
    if run is read_bias:
        del parts["two"]
    model = Net(run, enter=nn.Linear(6, 8), **parts)
    x = torch.randn(3, 6, dtype=torch.float64)
    small = check(model, f"{erase('enter.weight')},{erase('one')}", x)
    assert small.kept["bias"][0].tolist() == small.kept["one"][0].tolist()


def mixture(m: Any, x: Tensor) -> Tensor:
    return m.leave(m.enter(x).sigmoid() * m.mix.softmax(0))


def test_the_twin_of_readers_and_then_writers_at_zero() -> None:
    torch.manual_seed(0)
    model = Net(mixture, enter=nn.Linear(6, 8), leave=nn.Linear(8, 3),
                mix=nn.Parameter(torch.empty(8)))  # fmt: skip
    twice = f"{erase('enter.weight')},{erase('enter.weight')}"
    check(model, twice, torch.randn(3, 6, dtype=torch.float64))


def frozen_elsewhere(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.enter(x)
    mixed = m.end(m.one(x) * m.mix.softmax(0))
    return m.leave(y + m.down(m.up(y).relu() * m.mix)), mixed


def test_a_branch_stays_once_a_constant_was_computed_from_it() -> None:
    torch.manual_seed(0)
    model = Net(frozen_elsewhere, enter=nn.Linear(6, 8), one=nn.Linear(6, 8), end=nn.Linear(8, 3),
                up=nn.Linear(8, 8), down=nn.Linear(8, 8), leave=nn.Linear(8, 3),
                mix=nn.Parameter(torch.empty(8)))  # fmt: skip
    passes = "structured-erase{sparsity=0.4},erase-operators"
    small = check(model, passes, torch.randn(3, 6, dtype=torch.float64))
    assert small.program.frozen


def dense(m: Any, x: Tensor) -> Tensor:
    y = m.enter(x)
    w = m.weight / (m.weight.std((1, 2, 3), keepdim=True) + 1e-3)
    return m.leave(F.conv2d(torch.cat([y, m.up(y).relu()], 1), w, m.bias).relu())


def test_what_reads_a_branch_keeps_the_statistics_of_its_weights() -> None:
    torch.manual_seed(0)
    model = Net(dense, enter=nn.Conv2d(3, 6, 1), up=nn.Conv2d(6, 4, 1), leave=nn.Conv2d(5, 2, 1),
                weight=nn.Parameter(torch.empty(5, 10, 3, 3)),
                bias=nn.Parameter(torch.empty(5)))  # fmt: skip
    passes = "erase-operators,structured-erase{sparsity=0.4}"
    small = check(model, passes, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert small.kept["weight"][1].max() < 6
    assert small.program.frozen


def normed(m: Any, x: Tensor) -> Tensor:
    y = m.enter(x)
    return m.leave(torch.cat([y, m.up(y).relu()], 1))


def test_a_branch_goes_from_a_layer_with_a_normed_weight() -> None:
    torch.manual_seed(0)
    leave = nn.utils.parametrizations.weight_norm(nn.Conv2d(10, 2, 3))
    model = Net(normed, enter=nn.Conv2d(3, 6, 1), up=nn.Conv2d(6, 4, 1), leave=leave)
    passes = "erase-operators,structured-erase{sparsity=0.4}"
    small = check(model, passes, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert small.program.history[0].changed


def test_nan_is_no_number_of_branches() -> None:
    with pytest.raises(OptionError, match="keep_at_least"):
        EraseOperators(keep_at_least=float("nan"))
