"""Calibration data and losses that the command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import torchlathe as tl
from tests.tools import nets
from torchlathe.ir import InputError
from torchlathe.tools.calibration import load_calibration, load_loss
from torchlathe.tools.cli import main
from torchlathe.tools.models import NamedModel
from torchlathe.tools.report import Report

FLAP = "structured-erase{sparsity=0.5,importance=flap}"
TAYLOR = "structured-erase{sparsity=0.5,importance=taylor}"
DATA = """
import torch

CALLS = []
LIST = [torch.ones(4, 16)]
NUMBER = 3


def batches():
    CALLS.append(1)
    for number in range(3):
        yield torch.full((4, 16), float(number)), torch.arange(4)


def a_list():
    return [torch.ones(4, 16)]


def empty():
    return []


def failing():
    yield torch.ones(4, 16)
    raise ValueError("no more rows")


def text():
    return "no batches"


def loss(outputs, batch):
    return outputs.square().mean()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(Path(nets.__file__).read_text())
    (tmp_path / "data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def net() -> NamedModel:
    return NamedModel("net", nets.Net(), (torch.randn(4, 16),))


def keywords() -> NamedModel:
    kwargs = {"ids": torch.zeros(2, 5, dtype=torch.int64), "mask": torch.ones(2, 5)}
    return NamedModel("net", torch.nn.Identity(), (), kwargs)


def batches(name: str, model: NamedModel | None = None, size: int | None = None) -> list[Any]:
    found = load_calibration(name, model or net(), size)
    first, second = list(found), list(found)  # more than once
    assert len(first) == len(second)
    return first


# -- from files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_files_of_tensors(kind: str) -> None:
    # Doubles, as numpy makes them, for a model in float32; in the order of the model's inputs.
    x, y = torch.randn(11, 16).double(), torch.arange(11)
    if kind == "npz":
        np.savez("data.npz", target=y.numpy(), x=x.numpy())
    else:
        save_file({"target": y, "x": x}, "data.safetensors")
    found = batches(f"data.{kind}")
    assert [len(batch) for batch in found] == [2, 2]  # three rows are left over
    assert torch.equal(torch.cat([b[0] for b in found]), x[:8].float())
    assert torch.equal(torch.cat([b[1] for b in found]), y[:8])
    assert [len(b[0]) for b in batches(f"data.{kind}", size=3)] == [3, 3, 3]
    assert [len(b[0]) for b in batches(f"data.{kind}", size=50)] == [11]


def test_names_by_position_and_a_single_tensor() -> None:
    x, y = np.ones((4, 16), dtype=np.float32), np.arange(4)
    np.savez("numbered.npz", x, y)
    save_file({"1": torch.from_numpy(y), "0": torch.from_numpy(x)}, "numbered.safetensors")
    np.savez("single.npz", whatever=x)
    for name in ("numbered.npz", "numbered.safetensors"):
        ((a, b),) = batches(name)
        assert (a.dtype, b.dtype) == (torch.float32, torch.int64)
    ((a,),) = batches("single.npz")
    assert a.shape == (4, 16)


def test_keywords() -> None:
    ids = np.arange(20, dtype=np.int32).reshape(4, 5)
    np.savez("data.npz", labels=np.arange(4), mask=np.ones((4, 5)), ids=ids)
    found = batches("data.npz", keywords())
    assert len(found) == 2
    assert list(found[0]) == ["ids", "mask", "labels"]
    assert found[0]["ids"].dtype is torch.int64
    assert found[0]["mask"].dtype is torch.float32


def test_a_captured_model_knows_its_inputs() -> None:
    exported = torch.export.export(nets.Net(), (torch.randn(4, 16),))
    program = tl.capture(nets.Net(), (torch.randn(4, 16),))
    np.savez("data.npz", x=np.ones((8, 16)), y=np.arange(8))
    for model in (exported, program):
        found = batches("data.npz", NamedModel("saved", model))
        assert [tuple(b[0].shape) for b in found] == [(4, 16), (4, 16)]


# -- from Python -----------------------------------------------------------------------------------


def test_functions() -> None:
    found = load_calibration("data.py:batches", net())
    assert [float(x[0, 0]) for x, _ in found] == [0, 1, 2]
    assert len(list(found)) == 3
    assert len(batches("data.py:a_list")) == 1
    assert len(batches("data.py:LIST")) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("data.py", "data.py:function", id="no function"),
        pytest.param("data.py:batchs", "did you mean batches", id="misspelt"),
        pytest.param("data.py:NUMBER", "gave int, not batches", id="number"),
        pytest.param("data.py:text", "gave str, not batches", id="text"),
        pytest.param("data.py:empty", "gave no batch", id="empty"),
        pytest.param("nothing.npz", "there is no file", id="no file"),
        pytest.param("data.pt", "a pickle can run any code", id="pickle"),
        pytest.param("data.csv", "is not calibration data", id="other"),
        pytest.param("missing.module:name", "there is no module missing", id="no module"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_calibration(name, net())
    assert "model.pt2" not in str(caught.value)


def test_functions_that_fail_on_the_way() -> None:
    found = load_calibration("data.py:failing", net())
    with pytest.raises(InputError, match="ValueError: no more rows"):
        list(found)
    with pytest.raises(InputError, match="makes its own batches"):
        load_calibration("data.py:batches", net(), 3)


@pytest.mark.parametrize(
    ("tensors", "model", "message"),
    [
        pytest.param({"a": (4, 16), "b": (4,)}, net, "has a, b, but the model takes x", id="names"),
        pytest.param({"ids": (4, 5)}, keywords, "but the model takes ids, mask", id="missing"),
        pytest.param({"x": (4, 16), "y": (5,)}, net, "equally many rows", id="rows"),
        pytest.param({"x": (0, 16)}, net, "equally many rows", id="none"),
        pytest.param({"ids": (4, 5), "mask": (4, 5)}, keywords, "ids of .* is torch.f", id="dtype"),
    ],
)
def test_files_that_do_not_fit(tensors: Any, model: Any, message: str) -> None:
    arrays: Any = {name: np.ones(shape) for name, shape in tensors.items()}
    np.savez("data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_calibration("data.npz", model())


def test_files_that_are_damaged_or_hold_objects() -> None:
    np.savez("objects.npz", x=np.array([{"a": 1}], dtype=object))
    Path("broken.npz").write_bytes(b"PK\3\4 broken")
    Path("broken.safetensors").write_bytes(b"12345678{")
    for name in ("objects.npz", "broken.npz", "broken.safetensors"):
        with pytest.raises(InputError, match="cannot be read"):
            load_calibration(name, net())


# -- losses ----------------------------------------------------------------------------------------


def test_losses() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[0, 1, -100], [4, 4, 2]])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = load_loss("cross-entropy")

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    for outputs in (logits, (logits, 3), {"logits": logits}, Output(logits)):
        for batch in ((logits, labels), {"x": logits, "labels": labels}):
            assert torch.equal(loss(outputs, batch), want)
    assert float(load_loss("mse")(torch.zeros(2, 2), (0, torch.full((2, 2), 3)))) == 9
    assert float(load_loss("data.py:loss")(torch.ones(2), None)) == 1


@pytest.mark.parametrize(
    ("name", "outputs", "batch", "message"),
    [
        pytest.param("hinge", None, None, "there is no loss hinge", id="unknown"),
        pytest.param("data.py:NUMBER", None, None, "is int, not a function", id="number"),
        pytest.param("mse", torch.ones(2), torch.ones(2), "no labels", id="no labels"),
        pytest.param("mse", torch.ones(2), {"x": torch.ones(2)}, "no labels", id="no keyword"),
        pytest.param("mse", "text", (0, torch.ones(2)), "no tensor", id="no outputs"),
        pytest.param("mse", torch.ones(2), (0, torch.ones(3)), r"\(2,\) and \(3,\)", id="shapes"),
        pytest.param(
            "cross-entropy", torch.ones(2, 3), (0, torch.ones(2, 3)), "labels", id="classes"
        ),
    ],
)
def test_losses_that_cannot_be(name: str, outputs: Any, batch: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_loss(name)(outputs, batch)


# -- the whole -------------------------------------------------------------------------------------


def compiled(capsys: Any, *words: str) -> Report:
    command = ["compile", "nets.py:pair", "--no-latency", "--json", *words]
    assert main(command) == 0
    return Report.from_dict(json.loads(capsys.readouterr().out))


def test_a_pass_that_needs_data(capsys: Any, folder: Path) -> None:
    x = torch.randn(8, 16)
    save_file({"x": x, "labels": torch.randint(0, 10, (8,))}, folder / "d.safetensors")
    report = compiled(capsys, "-p", FLAP, "--calibration", "d.safetensors")
    told = [d["message"] for record in report.passes for d in record["diagnostics"]]
    assert not any("no calibration data" in str(message) for message in told)
    words = ("-p", TAYLOR, "--calibration", "d.safetensors", "--loss", "cross-entropy")
    report = compiled(capsys, *words)
    assert report.passes[0]["changed"]
    report = compiled(
        capsys, "-p", TAYLOR, "--calibration", "data.py:batches", "--loss", "data.py:loss"
    )
    assert report.passes[0]["changed"]


def test_memory_and_going_on(capsys: Any, folder: Path) -> None:
    save_file({"x": torch.randn(8, 16)}, folder / "d.safetensors")
    words = ["-p", FLAP, "--calibration", "d.safetensors", "--calibration-memory", "0"]
    words += ["--calibration-spill", "spill", "--calibration-resume", "state"]
    first = compiled(capsys, *words)
    states = {path: path.read_bytes() for path in (folder / "state").iterdir()}
    assert len(states) == 1
    again = compiled(capsys, *words)
    assert {path: path.read_bytes() for path in (folder / "state").iterdir()} == states
    assert first.families == again.families
    assert list((folder / "spill").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--calibration", "x.pt"], "a pickle can run any code", id="pickle"),
        pytest.param(["--calibration-batch", "3"], "needs --calibration", id="batch alone"),
        pytest.param(["--calibration-spill", "x"], "needs --calibration", id="spill alone"),
        pytest.param(
            ["--calibration", "data.py:batches", "--calibration-batch", "0"], "at least 1", id="0"
        ),
        pytest.param(
            ["--calibration", "data.py:LIST", "--calibration-memory", "-1"], "at least 0", id="-1"
        ),
        pytest.param(
            ["--calibration", "data.py:LIST", "--calibration-resume", "data.py"],
            "cannot be used as a folder",
            id="resume",
        ),
        pytest.param(["--loss", "l1"], "there is no loss l1", id="loss"),
        pytest.param(["-p", TAYLOR], "needs loss", id="no loss"),
        pytest.param(
            ["-p", TAYLOR, "--loss", "mse"], "needs calibration: the loss", id="no batches"
        ),
    ],
)
def test_errors_of_the_command(words: list[str], message: str, capsys: Any) -> None:
    assert main(["compile", "nets.py:pair", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
