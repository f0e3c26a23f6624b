"""Comparing models and artefacts."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import torchlathe as tl
from torchlathe.backends import CompiledModel
from torchlathe.ir import InputError, OptionError
from torchlathe.tools.cli import main
from torchlathe.tools.model_bench import ModelBench, ModelRow, bench_models
from torchlathe.tools.model_bench.comparing import interleaved
from torchlathe.tools.model_bench.contestants import split_name

CODE = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4)), (torch.randn(5, 6),)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 1 << 20)), (torch.randn(5, 6),)


def broken():
    raise ValueError("no weights")
"""
needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")


@pytest.fixture(name="model")
def fixture_model(tmp_path: Path) -> str:
    path = tmp_path / "model.py"
    path.write_text(CODE)
    return f"{path}:make"


def test_a_module_against_what_was_made_of_it(model: str, tmp_path: Path) -> None:
    assert main(["compile", model, "-p", "structured-erase{sparsity=0.5}", "--dynamic", "auto",
                 "--no-latency", "-o", str(tmp_path / "small.tl")]) == 0  # fmt: skip
    small = str(tmp_path / "small.tl")
    found = bench_models([model, small, f"{model}@eager"], seconds=0.2, memory=False)
    first, erased, captured = found.rows
    assert not any(row.problem for row in found.rows)
    assert found.batch == 5
    assert found.inputs == ("float32[5, 6]",)
    assert len(first.milliseconds) == len(erased.milliseconds) >= 5
    assert first.cosine == pytest.approx(1.0)
    assert captured.relative_error == 0.0
    assert erased.relative_error is not None
    assert erased.relative_error > 0.01
    assert erased.bytes == (tmp_path / "small.tl").stat().st_size
    assert first.bytes == 4 * (6 * 32 + 32 + 32 * 4 + 4)
    assert found.speedup(first) == pytest.approx(1.0)
    assert found.throughput(first) == pytest.approx(5e3 / first.percentile(0.5))
    text = found.text()
    assert "interleaved rounds" in text


@needs_onnx
def test_files_of_onnxruntime(model: str, tmp_path: Path) -> None:
    named = tl.tools.models.load_model(model)
    CompiledModel(named.capture(), "onnx").export(tmp_path / "model.onnx")
    found = bench_models([model, str(tmp_path / "model.onnx")], seconds=0.1, memory=False)
    row = found.rows[1]
    assert not row.problem
    assert row.relative_error == pytest.approx(0, abs=1e-5)  # float32, 32 terms


def test_what_cannot_be_measured_is_a_row_that_says_why(model: str) -> None:
    names = [model, model.replace(":make", ":broken"), f"{model}@nothing", "missing.onnx"]
    found = bench_models(names, seconds=0.1, memory=False)
    assert [bool(row.problem) for row in found.rows] == [False, True, True, True]
    assert "no weights" in found.rows[1].problem
    assert "no backend is called" in found.rows[2].problem
    assert "no weights" in found.text()
    with pytest.raises(InputError, match="first model cannot be measured"):
        bench_models([f"{model}@nothing", model], seconds=0.1, memory=False)
    with pytest.raises(InputError, match="nothing to compare"):
        bench_models([])


@pytest.mark.slow
def test_peak_memory_is_that_of_the_model(model: str) -> None:
    wide = model.replace(":make", ":wide")
    found = bench_models([wide, f"{wide}@eager"], seconds=0.1)
    for row in found.rows:
        # 28 MiB of weights and 20 MiB of outputs, which a compiled model copies.
        assert row.peak_bytes is not None
        assert 28 * 2**20 < row.peak_bytes < 400 * 2**20


def test_rounds_go_through_all_in_turn() -> None:
    calls: list[str] = []

    def run(name: str) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)

        return call

    samples = interleaved([run("a"), run("b")], (), {}, seconds=1e-9, rounds=3)
    assert [len(s) for s in samples] == [3, 3]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model.tl", ("model.tl", None)),
        ("model.tl@onnx", ("model.tl", "onnx")),
        ("a.py:f@inductor{freezing=true}", ("a.py:f", "inductor{freezing=true}")),
        ("/home/me@work/model.tl", ("/home/me@work/model.tl", None)),
    ],
)
def test_a_name_may_have_a_backend(name: str, parts: tuple[str, str | None]) -> None:
    assert split_name(name) == parts


def test_the_picture(tmp_path: Path) -> None:
    rows = (
        ModelRow("first", (1.0, 1.1, 0.9), 1000, cosine=1.0),
        ModelRow("second", (0.5, 0.6, 0.4), 500, cosine=0.98),
        ModelRow("third", problem="no such backend"),
    )
    found = ModelBench(rows, ("float32[2, 3]",), 2, 1)
    assert found.speedup(rows[1]) == pytest.approx(2.0, rel=0.2)
    for name in ("a.svg", "b.svg"):
        found.picture(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with pytest.raises(OptionError, match=r"not a\.gif"):
        found.picture(tmp_path / "a.gif")


def test_the_command_line(model: str, tmp_path: Path, capsys) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    words = ["bench", "model", model, "--seconds", "0.1", f"{model}@eager", "--no-memory"]
    assert main([*words, "-o", str(out), "--plot", str(plot)]) == 0
    assert "Models, against the first" in capsys.readouterr().out
    assert plot.exists()
    data = json.loads(out.read_text())
    assert data["rows"][1]["percentiles"]["p50"] > 0
    assert main(["bench", "model", model, "missing.tl", "--seconds", "0.1", "--no-memory"]) == 2
    assert main(["bench", "model", model, "--seconds", "0"]) == 2
    assert main(["bench"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--secnds", "1"], "--secnds"),
        (["--plot", "speed.gif"], "not speed.gif"),
        (["--threads", "0"], "at least 1"),
        (["--seconds", "soon"], "soon"),
        (["--inputs", "float32[5,"], "float32[5,"),
    ],
    ids=["option", "plot", "threads", "seconds", "inputs"],
)
def test_what_cannot_be_asked_is_said_before_anything_is_measured(
    words: list[str], said: str, model: str, monkeypatch, capsys
) -> None:
    def measure(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("torchlathe.tools.model_bench.comparing.interleaved", measure)
    assert main(["bench", "model", model, *words]) == 2
    assert said in capsys.readouterr().err


def test_two_artefacts_and_one_that_is_not_there(model: str, tmp_path: Path, capsys) -> None:
    small, gone = tmp_path / "small.tl", tmp_path / "gone.tl"
    main(["compile", model, "-p", "structured-erase", "--no-latency", "-o", str(small)])
    options = ["--seconds", "0.1", "--no-memory"]
    assert main(["bench", "model", str(small), str(small), *options]) == 0
    assert capsys.readouterr().out.count("1.00000") >= 2  # the cosine of each
    assert main(["bench", "model", str(small), str(gone), *options]) == 2
    assert "gone.tl" in capsys.readouterr().out
    assert main(["bench", "model", str(gone), str(small), "--no-memory"]) == 2
    assert "gone.tl" in capsys.readouterr().err


def test_show_and_backends(model: str, tmp_path: Path, capsys) -> None:
    small = tmp_path / "small.tl"
    main(["compile", model, "-p", "structured-erase", "--no-latency", "-o", str(small)])
    capsys.readouterr()
    assert main(["show", str(small), "--check"]) == 0
    out = capsys.readouterr().out
    assert "structured-erase" in out
    assert "weights.safetensors" in out
    assert "equal to their hashes" in out
    assert main(["show", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "torchlathe"
    data = bytearray(small.read_bytes())
    data[len(data) // 2] ^= 1
    small.write_bytes(bytes(data))
    assert main(["show", str(small), "--check"]) == 2
    assert main(["backends"]) == 0
    assert "onnx" in capsys.readouterr().out
    assert main(["backends", "inductor"]) == 0
    assert "freezing" in capsys.readouterr().out
    assert main(["backends", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} >= {"aoti", "eager"}
    assert main(["backends", "inducto"]) == 2
