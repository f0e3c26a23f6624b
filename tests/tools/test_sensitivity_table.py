"""The sensitivity as a table, a picture, JSON and a page."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from torchlathe.ir import capture
from torchlathe.passes import HessianSensitivity
from torchlathe.tools.bench import sensitivity_page
from torchlathe.tools.bench.bench_sensitivity import METHODS
from torchlathe.tools.cli import main
from torchlathe.tools.sensitivity_table import (
    SensitivityRow,
    save_sensitivity_picture,
    sensitivity_dicts,
    sensitivity_rows,
    sensitivity_table,
)

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (torch.randn(8, 4),)

def batches():
    torch.manual_seed(1)
    return [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
"""


@pytest.fixture(scope="module")
def rows() -> tuple[SensitivityRow, ...]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    program = capture(model, (batches[0][0],))
    found = HessianSensitivity(eigenvalues=True).on(
        program, calibration=batches, loss=lambda o, b: F.cross_entropy(o, b[1])
    )
    rows = sensitivity_rows(found)
    assert rows[0].trace == found.trace("0.weight", "0.bias").value
    assert [row.top for row in rows] == [found.extremes[row.name][0] for row in rows]
    return rows


def test_rows_and_table(rows: tuple[SensitivityRow, ...]) -> None:
    assert [(row.name, row.parameters) for row in rows] == [("0.weight", 30), ("2.weight", 18)]
    assert all(row.rounding_second > 0 and row.trace_error > 0 for row in rows)
    assert json.loads(json.dumps(sensitivity_dicts(rows)))[1]["name"] == "2.weight"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(sensitivity_table(rows, limit=1))
    text = console.export_text()
    dearest = max(rows, key=lambda row: row.rounding_second).name
    assert dearest in text
    assert "the 1 that cost most to round" in text
    assert sum(row.name in text for row in rows) == 1


def test_the_picture_is_the_same_each_time(
    rows: tuple[SensitivityRow, ...], tmp_path: Path
) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        save_sensitivity_picture(rows, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "2.weight" in (tmp_path / "a.svg").read_text()


def test_inspect(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("net.py").write_text(NET)
    data = ["--calibration", "net.py:batches", "--loss", "cross-entropy"]
    command = ["inspect", "net.py:make", "--sensitivity", "samples=4,draws=2", *data]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["sensitivity"]] == ["0.weight", "2.weight"]
    assert "families" not in found
    assert main([*command, "--sensitivity-picture", "s.svg"]) == 0
    assert "4-bit rounding" in capsys.readouterr().out
    assert Path("s.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--loss", "mse"], "--loss needs --sensitivity"),
        (["--sensitivity"], "needs --calibration"),
        (["--sensitivity", "sample=4", "--calibration", "net.py:batches"], "samples"),
        (["--sensitivity", "--calibration", "net.py:batches"], "needs loss"),
    ],
    ids=["loss-alone", "no-data", "misspelt", "no-loss"],
)
def test_inspect_refuses(
    arguments: list[str], text: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    assert main(["inspect", "net.py:make", *arguments]) != 0
    assert text in capsys.readouterr().err


def test_the_page_says_where_the_target_is_missed() -> None:
    row = {
        "net": "a net",
        "kind": "erase",
        "changes": 9,
        "whole_changes": 9,
        "exact_changes": 3,
        "drawn_vectors": 64,
        "median_change": 1e-3,
    }
    low = {**row, **dict.fromkeys(METHODS, 0.8)}
    high = {**row, **dict.fromkeys(METHODS, 0.95)}
    head = {"cpu": "a machine", "threads": 1, "torch": "2.13"}
    timed = {
        "parameters": 110e6,
        "batch": [4, 64],
        "options": "hessian-sensitivity",
        "samples": 8,
        "training_s": [1.0, 1.0],
        "plain_s": [2.0],
        "probed_s": [4.0],
        "capture_s": [3.0],
        "setup_s": [0.0],
        "peak": 2**31,
    }
    # (56 batches at 2 s and 8 at 4 s) to 64 steps of 1 s
    limits = {str(2**31): timed, str(2**28): {"peak": 2**29}}
    cost = {"peaks": {"training": 2**30}, "limits": limits}
    page = sensitivity_page.measured({**head, "rows": [low, high], "cost": cost})
    assert "*0.800*" in page
    assert "default is below 0.9 for: a net, erase (0.800)" in page
    assert "below it for:\na net, erase (0.800)" in page
    assert "| **2.25** | 2.00 GiB |" in page
    assert "| sensitivity, `limit_bytes` 256 MiB |  |  |  |  |  | 512 MiB |" in page
    good = sensitivity_page.measured({**head, "rows": [high], "cost": None})
    assert "in every row" in good
    old = f"a\n{sensitivity_page.BEGIN}\nold\n{sensitivity_page.END}\nb\n"
    again = sensitivity_page.updated(old, good)
    assert "old" not in again
    assert sensitivity_page.updated(again, good) == again
    assert again.startswith("a\n")
    assert again.endswith("\nb\n")
