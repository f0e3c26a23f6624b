"""Zeros of sparsify-nm through training, rounding and saving; and what cannot be swept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchlathe as tl
from torchlathe import PassManager, capture
from torchlathe.ir import Error, Program
from torchlathe.ir.provenance import info


class Net(nn.Module):
    """Linear layers, and one whose columns no pattern of four divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.second = nn.Linear(64, 64)
        self.odd = nn.Linear(64, 30)
        self.last = nn.Linear(30, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.odd):
            x = torch.relu(layer(x))
        return self.last(x)


def _data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    mix = torch.randn(32, 32)
    found = [torch.randn(32, 32) @ mix for _ in range(8)]
    return [(x, x[:, :4].argmax(1)) for x in found]


def _loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, batch[1])


def _sparse(spec: str) -> tuple[Program, Program]:
    """The program after sparsify-nm alone, and after what follows as well."""
    torch.manual_seed(0)
    data = _data()
    program = capture(Net().eval(), (data[0][0],), dynamic_shapes="auto")
    first = "sparsify-nm{method=magnitude,include=[first,second,odd]}"
    alone, after = (
        PassManager(text).run(program, calibration=data, loss=_loss)
        for text in (first, f"{first},{spec}")
    )
    return alone, after


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param("heal{steps=40,lr=0.003,warmup=2}", id="heal"),
        pytest.param("distill{steps=6,lr=0.01}", id="distill"),
        pytest.param("sparse-train{sparsity=0.3,steps=24,pruning=8,lr=0.01}", id="sparse-train"),
    ],
)
def test_training_keeps_zeros(spec: str) -> None:
    alone, after = _sparse(spec)
    for name in ("first.weight", "second.weight", "odd.weight"):
        old, new = alone.tensor(name).detach(), after.tensor(name).detach()
        assert bool((new[old == 0] == 0).all()), name
        assert not torch.equal(old, new)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("scheme=w8a8", id="w8a8"),
        pytest.param("scheme=w4a16,group=32", id="w4"),
        pytest.param("scheme=w4a16,group=32,symmetric=false", id="w4-zero-points"),
        pytest.param("scheme=w2a16", id="w2"),
        pytest.param("scheme=nvfp4", id="nvfp4"),
        pytest.param("scheme=w4a16,group=32,method=gptq", id="gptq"),
        pytest.param("scheme=w4a8,group=32,method=gptq,symmetric=false", id="gptq-zero-points"),
    ],
)
def test_rounding_keeps_zeros(options: str, tmp_path: Path) -> None:
    alone, after = _sparse(f"quantize{{{options}}}")
    compiled = tl.backends.CompiledModel(after)
    compiled.save(tmp_path / "model.tl")
    for program in (after, tl.load(tmp_path / "model.tl").program):
        found = _weights(program)
        for name in ("first", "second", "odd"):
            old = alone.tensor(f"{name}.weight").detach()
            assert bool((found[name][old == 0] == 0).all()), name


def test_a_pattern_in_the_sweep_keeps_zeros_that_are_there() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[torch.rand_like(layer.weight) < 0.4] = 0
        model.second.weight[:, :8] = 0
    data = [x for x, _ in _data()]
    program = capture(model, (data[0],), dynamic_shapes="auto")
    spec = "quantize{scheme=w8a16,method=gptq,pattern=2:4,include=[first,second]}"
    after = _weights(PassManager(spec).run(program, calibration=data))
    for name, new in after.items():
        old = program.tensor(f"{name}.weight").detach()
        assert bool((new[old == 0] == 0).all())
        parts, were = new.unflatten(1, (-1, 4)) != 0, old.unflatten(1, (-1, 4)) != 0
        assert bool((parts.sum(2) <= 2).all())
        # The pattern was there already, and what there was is next to never rounded to zero.
        fit = were.sum(2) <= 2
        assert float((parts == were)[fit].float().mean()) > 0.95


def _weights(program: Program) -> dict[str, torch.Tensor]:
    """What the layers multiply with, by module."""
    found = {}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.torchlathe.dequantize.default
    ):
        args = [program.tensor(str(info(a).tensor)) if hasattr(a, "op") else a for a in node.args]
        name = str(info(node.args[0]).tensor)
        found[name.partition(".")[0]] = node.target(*args).detach()
    return found


def test_patterns_that_do_not_divide_are_told() -> None:
    torch.manual_seed(0)
    data = [x for x, _ in _data()]
    program = capture(Net().eval(), (data[0],), dynamic_shapes="auto")
    after = PassManager("sparsify-nm{pattern=2:4}").run(program, calibration=data)
    told = {str(d["name"]): str(d["message"]) for d in after.history[-1].diagnostics}
    assert "its 30 columns are no multiple of 4" in told["last.weight"]
    assert bool((after.tensor("last.weight") != 0).all())
    spec = "quantize{scheme=w4a16,group=16,method=gptq,pattern=2:4}"
    both = PassManager(spec).run(program, calibration=data)
    warned = {
        str(d["name"]): str(d["message"])
        for d in both.history[-1].diagnostics
        if d["severity"] == "warning"
    }
    assert "its 30 columns are no multiple of 4" in warned["last.weight"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_weights_and_data_that_are_not_finite(value: float) -> None:
    torch.manual_seed(0)
    data = [x for x, _ in _data()]
    model = Net().eval()
    broken = [*data[:-1], data[-1].clone()]
    broken[-1][3, 5] = value
    program = capture(model, (data[0],), dynamic_shapes="auto")
    for spec in (
        "quantize{method=gptq}",
        "quantize{balance=smoothquant}",
        "quantize{scheme=w4a16,group=32,balance=awq,insert=true}",
        "sparsify-nm",
        "sparsify-nm{method=wanda}",
    ):
        with pytest.raises(Error, match=r"first\.weight.*not finite") as caught:
            PassManager(spec).run(program, calibration=broken)
        assert "calibration data" in str(caught.value)
    with pytest.raises(Error, match=r"first\.weight.*not finite"):
        PassManager("quantize{bytes=0.5}").run(program, calibration=[broken[-1]])
    with torch.no_grad():
        model.second.weight[1, 2] = value
    program = capture(model, (data[0],), dynamic_shapes="auto")
    for spec in ("quantize", "sparsify-nm{method=magnitude}"):
        with pytest.raises(Error, match=r"second\.weight has values that are not finite"):
            PassManager(spec).run(program, calibration=data)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "w2a16", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_channels_that_are_dead_on_both_sides(scheme: str, method: str) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.first.weight[4] = 0
        model.first.bias[4] = -1.0
        model.second.weight[:, 7] = 0
        model.second.weight[9] = 0
    data = [x for x, _ in _data()]
    program = capture(model, (data[0],), dynamic_shapes="auto")
    after = PassManager(f"quantize{{scheme={scheme},method={method}}}").run(
        program, calibration=data
    )
    weights = _weights(after)
    assert bool((weights["second"][9] == 0).all())
    assert bool((weights["second"][:, 7] == 0).all())
    assert bool(torch.isfinite(after.run(data[0])).all())
