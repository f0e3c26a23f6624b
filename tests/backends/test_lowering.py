"""What holds for every backend: its needs, the check before it is handed out, changed weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import torchlathe as tl
from tests.backends.small_models import Perceptron, dynamic_perceptron, lowerable
from torchlathe.backends import (
    Capabilities,
    CompiledModel,
    Configured,
    DisagreementError,
    Eager,
    Lowerable,
)
from torchlathe.backends.examples import grown_inputs
from torchlathe.backends.inductor import stored_values
from torchlathe.backends.rounding import rounds
from torchlathe.ir import BackendError, UnsupportedError, capture


@dataclass(frozen=True)
class Wrong(Configured):
    """Gives what the eager program gives, changed."""

    name = "wrong"
    by: float = 0.0
    size: int = 0
    able: Capabilities = field(default_factory=Capabilities)

    @property
    def capabilities(self) -> Capabilities:
        return self.able

    def lower(self, source: Lowerable) -> Callable[..., Any]:
        eager = Eager().lower(source)

        def call(*inputs: Any) -> list[Any]:
            if self.size and inputs[0].shape[0] != self.size:
                raise RuntimeError("one size only")
            return [x + self.by * x.abs().max() for x in eager(*inputs)]

        return call


class Frozen(Wrong):
    """Copies the weights, as compilers do."""

    name = "frozen"

    def lower(self, source: Lowerable) -> Callable[..., Any]:
        made = source.graph_module()
        tensors = {n: t.detach().clone() for n, t in source.tensors.named_parameters()}

        def call(*inputs: Any) -> Any:
            own = {f"tensors.{n}": t for n, t in tensors.items()}
            return torch.func.functional_call(made, own, inputs)

        return call


def test_another_function_is_not_handed_out() -> None:
    program = dynamic_perceptron(Perceptron())
    fine = CompiledModel(program, Wrong(1e-6))
    assert fine.agreement is not None
    assert 0 < fine.agreement.error < 1e-5
    assert fine.agreement.sizes == 2
    assert fine.agreement.tolerance == pytest.approx(2e-4)
    with pytest.raises(DisagreementError, match=r"'wrong' does not compute.*differs by 0.001") as e:
        CompiledModel(program, Wrong(1e-3))
    assert isinstance(e.value, BackendError)
    assert CompiledModel(program, Wrong(1e-3), check=False).agreement is None


def test_the_tolerance_is_that_of_the_dtype() -> None:
    program = capture(Perceptron().double(), (torch.randn(2, 4, dtype=torch.float64),))
    with pytest.raises(DisagreementError, match="tolerance 1e-06"):
        CompiledModel(program, Wrong(1e-5))


def test_the_check_tries_another_size() -> None:
    program = dynamic_perceptron(Perceptron())
    with pytest.raises(BackendError, match=r"another size.*one size only"):
        CompiledModel(program, Wrong(size=2))
    static = capture(Perceptron(), (torch.randn(2, 4),))
    assert CompiledModel(static, Wrong(size=2)).agreement.sizes == 1  # type: ignore[union-attr]


def test_verify_off_hands_out_what_there_is() -> None:
    model, x = Perceptron().eval(), torch.randn(2, 4)
    with pytest.raises(DisagreementError):
        tl.compile(model, (), x, backend=Wrong(0.1), measure_latency=False)
    tl.compile(model, (), x, backend=Wrong(0.1), verify="off", measure_latency=False)


@pytest.mark.parametrize(
    ("able", "message"),
    [
        (Capabilities(dtypes=(torch.float64,)), r"fc1.weight is float32, and .* has float64"),
        (Capabilities(devices=("cuda",)), r"fc1.weight is on cpu, and .* runs on cuda"),
        (Capabilities(dynamic_shapes=False), "the program has dynamic dimensions"),
        (Capabilities(packages=("no_such_thing",), extra="onnx"), "needs no_such_thing"),
    ],
    ids=["dtype", "device", "dynamic", "package"],
)
def test_what_a_backend_cannot_do_is_refused_before_it_works(
    able: Capabilities, message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        CompiledModel(dynamic_perceptron(Perceptron()), Wrong(able=able))


def test_copied_weights_follow_those_of_the_model() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), Frozen(), source=model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), model(x))
    other = Perceptron().eval()
    compiled.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))
    other = Perceptron().eval()
    compiled.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(compiled(x), other(x))
    with torch.no_grad():
        compiled.get_parameter("fc2.bias").add_(1)
        other.fc2.bias.add_(1)
    torch.testing.assert_close(compiled(x), other(x))
    compiled.double()
    torch.testing.assert_close(compiled(x.double()), other.double()(x.double()))


def test_a_backend_without_a_file_says_so(tmp_path) -> None:
    program = dynamic_perceptron(Perceptron())
    for backend in ("eager", Frozen()):
        with pytest.raises(UnsupportedError, match="makes no file"):
            CompiledModel(program, backend).export(tmp_path / "model.bin")


def test_dynamic_inputs_grow_up_to_their_limit() -> None:
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(1)

    shapes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t", max=6)}}
    program = capture(Pool(), (torch.randn(2, 6, 3),), dynamic_shapes=shapes)
    grown = grown_inputs(program)
    assert grown is not None
    assert grown[0].shape == (3, 6, 3)
    assert grown_inputs(capture(Pool(), (torch.randn(2, 6, 3),))) is None


def test_rounding_of_activations_is_seen() -> None:
    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 127).round() / 127

    assert rounds(capture(Rounding(), (torch.randn(2, 3),)))
    assert not rounds(capture(Perceptron(), (torch.randn(2, 4),)))


def test_rows_that_are_read_twice_are_stored_by_the_inductor() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    x = torch.randn(2, 64)
    options = []
    for passes in ("quantize,fuse-kernels{runtime=inductor}", "quantize{scheme=w8a16}", ""):
        program = tl.PassManager(passes, verify="off").run(capture(model, (x,)))
        options.append(stored_values(lowerable(program)))
    assert options == [{"realize_opcount_threshold": 6}, {}, {}]
    assert hasattr(torch._inductor.config, "realize_opcount_threshold")


def test_the_report_tells_how_well_it_agrees() -> None:
    model, x = Perceptron().eval(), torch.randn(2, 4)
    compiled = tl.compile(model, (), x, backend=Wrong(1e-6), measure_latency=False)
    report = compiled.report
    assert report.agreement["error"] == compiled.agreement.error  # type: ignore[union-attr]
    assert "Checked: wrong" in report.text()
    assert "of the eager" in report.to_html()
    assert type(report).from_dict(report.to_dict()) == report
