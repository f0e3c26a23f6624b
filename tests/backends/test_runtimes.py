"""The backends of other runtimes: AOTInductor, ONNX Runtime, OpenVINO, ExecuTorch, and auto."""

import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import torchlathe as tl
from tests.backends.small_models import (
    Perceptron,
    Tied,
    dynamic_perceptron,
    erase_by_hand,
    lowerable,
    tied_inputs,
)
from torchlathe.backends import CompiledModel, Inductor
from torchlathe.backends.exporting import exported_program
from torchlathe.backends.onnx import Onnx
from torchlathe.ir import BackendError, OptionError, Program, UnsupportedError, capture

aten = torch.ops.aten

# ExecuTorch leaves threads behind that are not its own to end, hence the order: it comes last.
RUNTIMES = [
    pytest.param(
        name,
        id=name,
        marks=[
            pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}"),
            *marks,
        ],
    )
    for name, package, marks in (
        ("onnx", "onnxruntime", ()),
        ("openvino", "openvino", ()),
        ("aoti", "torch", (pytest.mark.cxx, pytest.mark.slow)),
        ("inductor{freezing=true}", "torch", (pytest.mark.cxx, pytest.mark.slow)),
        ("executorch", "executorch", (pytest.mark.slow,)),
    )
]
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")


def dynamic_tied(model: nn.Module) -> Program:
    ids, kwargs = tied_inputs()
    sizes = {0: Dim("batch"), 1: Dim("length")}
    return capture(model, (ids,), kwargs, dynamic_shapes={"ids": sizes, "mask": sizes})


@pytest.mark.parametrize("backend", RUNTIMES)
def test_an_erased_program_runs_at_every_batch(backend: str) -> None:
    model = Perceptron().eval()
    program = erase_by_hand(dynamic_perceptron(model))
    compiled = CompiledModel(program, backend, source=model)
    eager = CompiledModel(program, source=model)
    for batch in (2, 1, 7):
        x = torch.randn(batch, 4)
        # Another order of summation over four or eight numbers.
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [p for p in RUNTIMES if p.id != "executorch"])
def test_the_calling_convention_survives(backend: str) -> None:
    """Keywords, a dict of outputs, None, a size among the outputs, ties, buffers, constants."""
    model = Tied().eval()
    compiled = CompiledModel(dynamic_tied(model), backend, source=model)
    for batch, length in ((2, 5), (3, 8)):
        ids, kwargs = tied_inputs(batch, length)
        want, got = model(ids, **kwargs), compiled(ids, **kwargs)
        assert list(got) == list(want)
        assert got["size"] == length
        assert got["pooled"][1] is None
        for name in ("logits",):
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got["pooled"][0], want["pooled"][0], rtol=1e-4, atol=1e-4)


@needs_onnx
def test_changed_weights_are_lowered_again() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), "onnx", source=model)
    other = Perceptron().eval()
    compiled.load_state_dict(other.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-5)


class Chain(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        second = x / 3 / 5
        third = second / 7
        return second, third, (third / 9).relu()


class Constant(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x / 3 / 7, x + self.shift / 5


@needs_onnx
def test_outputs_are_named_apart_from_constants() -> None:
    x, model = torch.randn(3, 4), Constant().eval()
    program = capture(model, (x,))
    with program.edit() as edit:
        (first, *_) = program.graph.find_nodes(op="call_function", target=aten.div.Tensor)
        edit.replace(first, edit.call(aten.mul.Tensor, (first.args[0], 1 / 3), like=first))
    for got, want in zip(CompiledModel(program, "onnx")(x), model(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@needs_onnx
def test_outputs_are_named_apart_from_what_is_inside() -> None:
    x = torch.randn(3, 4)
    program = capture(Chain(), (x,))
    with program.edit() as edit:
        (first, *_) = program.graph.find_nodes(op="call_function", target=aten.div.Tensor)
        edit.replace(first, edit.call(aten.mul.Tensor, (first.args[0], 1 / 3), like=first))
    # Exported anew, what stands before an output has the name that the output had.
    names = [n.name for n in program.graph.find_nodes(op="call_function", target=aten.div.Tensor)]
    assert names == ["div_1", "div_2", "div_3"]
    for got, want in zip(CompiledModel(program, "onnx")(x), Chain()(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# -- files ----------------------------------------------------------------------------------------


@needs_onnx
def test_an_onnx_file_runs_in_onnxruntime_alone(tmp_path: Path) -> None:
    import onnxruntime

    model = Tied().eval()
    path = tmp_path / "model.onnx"
    CompiledModel(dynamic_tied(model), "onnx", source=model).export(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["ids", "mask"]
    assert all(isinstance(n, str) for i in session.get_inputs() for n in i.shape)  # dynamic
    ids, kwargs = tied_inputs(4, 6)
    outputs = session.run(None, {"ids": ids.numpy(), "mask": kwargs["mask"].numpy()})
    want = model(ids, **kwargs)["logits"].detach()
    torch.testing.assert_close(torch.from_numpy(outputs[0]), want, rtol=1e-4, atol=1e-4)


@needs_onnx
def test_a_large_onnx_file_has_its_weights_beside_it(tmp_path, monkeypatch) -> None:
    import onnxruntime

    monkeypatch.setattr("torchlathe.backends.onnx._LIMIT", 10)
    model = Perceptron(4096).eval()
    path = tmp_path / "named.onnx"
    CompiledModel(dynamic_perceptron(model), "onnx", source=model).export(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.onnx", "named.onnx.data"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 4)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_an_openvino_file_runs_in_openvino_alone(tmp_path: Path) -> None:
    import openvino

    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), "openvino", source=model)
    with pytest.raises(OptionError, match=r"writes \.xml"):
        compiled.export(tmp_path / "model.bin")
    compiled.export(tmp_path / "model.xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    found = openvino.Core().compile_model(str(tmp_path / "model.xml"), "CPU")
    x = torch.randn(3, 4)
    # Without a hint OpenVINO may compute in bfloat16, of 8 bits.
    got = torch.tensor(found([x.numpy()])[0])
    torch.testing.assert_close(got, model(x).detach(), rtol=2e-2, atol=2e-2)


_ALONE = """
import sys


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchlathe":
            raise ImportError("there is no torchlathe here")


sys.meta_path.insert(0, Nothing())
import torch

try:
    import torchlathe
except ImportError:
    pass
else:
    raise SystemExit("torchlathe can be imported")
package = torch._inductor.aoti_load_package(sys.argv[1])
given = torch.load(sys.argv[2], weights_only=True)
print(package.loader.get_metadata()["torchlathe.inputs"])
torch.save(package(*given["inputs"])[0], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.cxx
def test_a_package_runs_in_a_process_without_torchlathe(tmp_path: Path) -> None:
    model = Tied().eval()
    compiled = CompiledModel(dynamic_tied(model), "aoti", source=model)
    compiled.export(tmp_path / "model.pt2")
    ids, kwargs = tied_inputs(4, 6)
    torch.save({"inputs": [ids, kwargs["mask"]]}, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, "model.pt2", "inputs.pt", "out.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ids,mask"
    got = torch.load(tmp_path / "out.pt")
    want = model(ids, **kwargs)["logits"].detach()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- what cannot be -------------------------------------------------------------------------------


@needs_onnx
def test_a_dtype_that_onnx_does_not_have_is_named() -> None:
    program = capture(Perceptron().bfloat16(), (torch.randn(2, 4, dtype=torch.bfloat16),))
    with pytest.raises(BackendError, match=r"bfloat16.*float32, float64, float16"):
        CompiledModel(program, "onnx")


class Fourier(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize("backend", [p for p in RUNTIMES if p.id in ("onnx", "openvino")])
def test_an_op_that_a_runtime_does_not_have_is_a_named_error(backend: str) -> None:
    program = capture(Fourier(), (torch.randn(3, 3),))
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with pytest.raises(BackendError, match=r"could not export|does not take|refuses"):
        CompiledModel(program, backend)
    assert (root.level, list(root.handlers)) == before


@needs_onnx
def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(BackendError, match="has no NoSuchProvider here"):
        CompiledModel(dynamic_perceptron(Perceptron()), Onnx(providers=("NoSuchProvider",)))


def test_a_program_without_tensors_to_give_is_refused() -> None:
    class Size(nn.Module):
        def forward(self, x: torch.Tensor) -> int:
            return 3

    source = lowerable(capture(Size(), (torch.randn(2, 3),)))
    with pytest.raises(BackendError, match="gives no tensor"):
        exported_program(source)


# -- auto -----------------------------------------------------------------------------------------


def test_auto_keeps_the_fastest_that_agrees() -> None:
    model, x = Perceptron().eval(), torch.randn(2, 4)
    backend = "auto{candidates=[eager,onnx,openvino],budget-seconds=30}"
    compiled = tl.compile(model, (), x, dynamic_shapes="auto", backend=backend)
    rows = {row.backend: row for row in compiled.candidates}
    assert list(rows) == ["eager", "onnx", "openvino"]
    (kept,) = (row for row in compiled.candidates if row.outcome == "kept")
    measured = [row.milliseconds for row in rows.values() if row.milliseconds is not None]
    assert kept.milliseconds == min(measured)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    text = compiled.report.text()
    assert "Backends, measured in turn" in text
    assert "kept" in text
    assert compiled.report.candidates[0]["backend"] == "eager"
    assert "<h2>Backends</h2>" in compiled.report.to_html()


def test_auto_says_why_it_left_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torchlathe.backends.needs.find_spec",
        lambda name: None if name == "openvino" else find_spec(name),
    )
    program = capture(Perceptron().bfloat16(), (torch.randn(2, 4, dtype=torch.bfloat16),))
    compiled = CompiledModel(program, "auto{candidates=[eager,openvino,onnx],rounds=2}")
    eager, openvino, onnx = compiled.candidates
    assert eager.outcome == "kept"
    assert (openvino.outcome, openvino.note) == ("skipped", "openvino is not installed")
    assert onnx.outcome in ("refused", "skipped")
    with pytest.raises(BackendError, match="no candidate can run"):
        CompiledModel(program, "auto{candidates=[openvino,onnx]}")
    with pytest.raises(UnsupportedError, match="has no file"):
        compiled.export("model.onnx")


def test_a_spent_budget_leaves_the_rest_out() -> None:
    program = dynamic_perceptron(Perceptron())
    compiled = CompiledModel(
        program, "auto{candidates=[eager,inductor],budget-seconds=1e-9,rounds=3}"
    )
    assert [row.note for row in compiled.candidates] == ["", "the budget was spent"]


def test_a_candidate_with_options() -> None:
    text = 'auto{candidates=["inductor{freezing=true}",eager]}'
    from torchlathe.backends import backend_text, get_backend
    from torchlathe.backends.auto import Auto

    found = get_backend(text)
    assert isinstance(found, Auto)
    assert backend_text(found) == text
    assert get_backend(found.candidates[0]) == Inductor(freezing=True)
