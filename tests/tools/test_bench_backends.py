"""The page of the backends, from results."""

import json
from pathlib import Path

from torchlathe.tools.bench.backends_page import measured

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
    rows = [
        {"name": "original, inductor", "ms": [10.0, 12.0, 11.0], "cosine": 1.0},
        {"name": "torchlathe quantize · onnx", "ms": [5.0, 6.0, 5.5], "cosine": 0.99912},
        {"name": "torchao", "problem": "not | here"},
    ]
    case = {"weights": "pretrained", "threads": 1, "rows": rows}
    data = {"cases": {"MiniLM": case}, "machine": MACHINE}
    (tmp_path / "end_to_end_cpu.json").write_text(json.dumps(data))
    text = measured(tmp_path)
    assert "| torchlathe quantize · onnx | 5.5 | 2.00 | 0.9991 |" in text
    assert "| torchao | - | - | not / here |" in text
    assert "#### MiniLM (pretrained weights)" in text
