"""The page of the backends, from results."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.module_models import Closure
from torchlathe.ir import BackendError, capture
from torchlathe.passes import PassManager
from torchlathe.tools.bench import bench_artifact, bench_backends
from torchlathe.tools.bench.backends_page import measured, serving_part
from torchlathe.tools.bench.bench_backends import _todo
from torchlathe.tools.bench.end_to_end.page import draw

MACHINE = {"cpu": "a processor", "torch": "2.13", "threads": 1}


def test_the_page_counts_what_agrees_and_lists_what_does_not(tmp_path: Path) -> None:
    row = {"mode": "static", "backend": "onnx", "outcome": "agrees", "error": 1e-6}
    bad = {**row, "outcome": "BackendError", "note": "no such\nop | here"}
    rows = {"quantize": {"timm/a": [row], "timm/b": [bad, {**row, "mode": "dynamic"}]}}
    (tmp_path / "backends_cpu.json").write_text(json.dumps({"rows": rows, "machine": MACHINE}))
    text = measured(tmp_path)
    assert "| `onnx` | 1 of 2, 1.0e-06 | 1 of 1, 1.0e-06 |" in text
    assert "| timm/b | static | `onnx` | BackendError | no such op / here |" in text


def test_the_page_has_speeds_against_the_inductor(tmp_path: Path) -> None:
    rows: dict[str, dict[str, Any]] = {
        "original, inductor": {"ms": [10.0, 12.0], "base_ms": [10.0, 12.0], "cosine": 1.0},
        "torchlathe quantize · onnx": {
            "ms": [5.0, 6.0, 5.5],
            "base_ms": [10.0, 12.0, 11.0],
            "cosine": 0.99912,
        },
        "torchlathe quantize · inductor": {"ms": [4.0], "base_ms": [12.0], "cosine": 0.99},
        "torchlathe quantize · openvino": {"cosine": 0.5},
        "torchao": {"problem": "not | here"},
    }
    for row in rows.values():
        row |= {"threads": 2, "clock": "wall"}
    data = {"cases": {"MiniLM": {"weights": "random", "rows": rows}}, "machine": MACHINE}
    (tmp_path / "end_to_end_cpu.json").write_text(json.dumps(data))
    text = measured(tmp_path)
    assert "| torchlathe, `quantize`, `onnx` | 5.5 | 2.00 | 0.9991 |" in text
    assert "| torchlathe, `quantize`, `openvino` | - | - | 0.5000 |" in text
    assert "| torchao | - | - | not / here |" in text
    assert "#### MiniLM, random weights" in text
    assert "2 threads" in text
    lines = [line for line in text.splitlines() if line.startswith("| torchlathe")]
    assert "inductor" in lines[0]  # the fastest of ours is first
    draw(data, tmp_path / "a.svg")
    draw(data, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_pages_have_compile_time_and_load(tmp_path: Path) -> None:
    row = {"overhead": 4.0, "stages": {"capture": 1.5, "passes": 2.5, "lower": 9.0}}
    data: dict[str, Any] = {"machine": MACHINE, "passes": "quantize", "backend": "eager"}
    text = json.dumps({**data, "verify": "fast", "rows": [row]})
    (tmp_path / "overhead_cpu.json").write_text(text)
    assert "| capture | passes | all |" in measured(tmp_path)
    assert "| 1.5 | 2.5 | 4.0 |" in measured(tmp_path)
    run = {"requests": 90, "failures": 0, "per_second": 30.0, "p50": 1.0, "p95": 2.0, "p99": 3.0}
    assert serving_part(tmp_path) == ""
    text = json.dumps({**data, "threads": 1, "clients": 8, "rows": {"compiled": [run]}})
    (tmp_path / "serving_cpu.json").write_text(text)
    assert "| compiled | 90 | 0 | 30.0 | 1.0 | 2.0 | 3.0 |" in serving_part(tmp_path)


def test_a_benchmark_goes_on_where_it_stopped() -> None:
    rows = {
        "a": [{"backend": "onnx", "outcome": "agrees"}, {"backend": "aoti", "outcome": "crash"}],
        "b": [{"backend": "onnx", "outcome": "BackendError"}],
    }
    backends = ["onnx", "aoti"]
    assert _todo(rows, ["a", "b"], backends, again=False) == {"b": ["aoti"]}
    again = _todo(rows, ["a", "b"], backends, again=True)
    assert again == {"a": ["aoti"], "b": ["onnx", "aoti"]}


def test_a_worker_that_crashes_or_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = """
print('row {"model": "a", "mode": "static", "backend": "x", "outcome": "agrees"}', flush=True)
print('done a', flush=True)
"""

    def run(script: str) -> list[Any]:
        monkeypatch.setattr(bench_backends, "_command", lambda *_: [sys.executable, "-c", script])
        return list(bench_backends._work({"a": ["x"], "b": ["x"]}, "", time.monotonic() + 60))

    (a, rows), (b, crashed) = run(talk + "raise SystemExit('gone')")
    assert (a, b) == ("a", "b")
    assert rows[0]["outcome"] == "agrees"
    assert crashed == [
        {"mode": "static", "backend": "x", "outcome": "crash", "note": "exit status 1: gone"}
    ]
    monkeypatch.setattr(bench_backends, "LIMIT", 1.0)
    _, (_, hung) = run(talk + "import time; time.sleep(60)")
    assert hung[0]["outcome"] == "limit"


def test_advice_of_an_error_is_followed() -> None:
    model = Closure().eval()
    program = capture(model, (torch.randn(2, 6),))
    passes = "structured-erase{sparsity=0.5}"
    changed = PassManager(passes, verify="off").run(program)
    assert changed.cost().parameters < program.cost().parameters
    compiled, excluded = bench_backends._lowered(program, changed, passes, "module", model)
    assert excluded == ["up.weight:0/0", "up.weight:0/1"]
    assert compiled.program.cost().parameters == program.cost().parameters
    assert bench_backends._agreement(compiled, [((torch.randn(2, 6),), {})])["error"] < 2e-4
    # Without advice the error is told as it is.
    with pytest.raises(BackendError, match="refuses"):
        bench_backends._lowered(program, program, passes, "inductor{options={no_such: 1}}", model)


def test_an_artefact_is_loaded_in_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_artifact, "WIDTH", 32)
    path = tmp_path / "model.tl"
    assert bench_artifact.make(path, 0)
    row = bench_artifact.loads(path)
    assert list(row) == ["read", "load", "mmap", "mmap, check=False"]
    result = {"machine": MACHINE, "bytes": 4e8, "same_bytes": True, "rows": [dict.fromkeys(row, 1)]}
    (tmp_path / "artifact_cpu.json").write_text(json.dumps(result))
    text = measured(tmp_path)
    assert "of 400 MB" in text
    assert "| 1.00 | 1.00 | 1.00 | 1.00 |" in text
