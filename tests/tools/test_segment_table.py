"""``inspect --segments``, and erasing operators from the command line."""

import json
from pathlib import Path

import pytest
import torch

from torchlathe.backends import load
from torchlathe.tools.cli import main

NET = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        return x * torch.sigmoid(self.gate(x))


def make():
    return nn.Sequential(nn.Linear(8, 8), Block(), nn.Linear(8, 3)), (torch.randn(2, 8),)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_branches_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model.py:make", "--segments"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("Branches") :]
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[2].startswith("1.up..down 280 ")
    assert rows[2].endswith("exact")
    assert "1.gate" in rows[3]
    assert "not possible: it holds 0.5 when its parameters are zero" in rows[3]
    assert "6 segments, 2 of them joints" in table
    assert "Families" not in out


def test_segments_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "model.py:make", "--segments", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["segments"]
    assert [row["name"] for row in found if row["removable"]] == ["1.up..down"]
    assert found[0]["successors"] == ["1.up..down", "1.add"]


def test_erasing_operators(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--no-latency", "--json", "-o", "small.tl"]
    text = "erase-operators{count=1},structured-erase{sparsity=0.2}"
    assert main(["compile", "model.py:make", "--passes", text, *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passes"][0]["statistics"]["erased_branches"] == 1
    assert report["passes"][0]["exactness"] == "exact"
    model = load("small.tl")
    assert {name.rpartition(".")[0] for name in model.state_dict()} == {"0", "1.gate", "2"}
    assert model(torch.randn(2, 8)).shape == (2, 3)


def test_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "model.py:make", "--passes", "erase-operators{cuont=1}"]) != 0
    assert "did you mean count?" in capsys.readouterr().err
