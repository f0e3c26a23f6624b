"""The benchmark of sparse training: its page, and rows of other numbers of steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from torchlathe.tools.bench.bench_sparse_training import RESULTS, _is_current
from torchlathe.tools.bench.markdown import MARK
from torchlathe.tools.bench.sparse_training.resnet import ResNet18
from torchlathe.tools.bench.sparse_training.tasks import TASKS
from torchlathe.tools.bench.sparse_training_page import measured

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sparse_training.md"


def test_the_page_is_made_of_the_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    _, mark, text = PAGE.read_text(encoding="utf-8").partition(MARK)
    assert mark
    assert text == measured(result)


def test_rows_of_another_number_of_steps_are_measured_anew() -> None:
    steps = TASKS["digits CNN"](0).steps
    assert _is_current("digits CNN|HESSO|0.7|0", {"steps": steps}, ["digits CNN"])
    assert not _is_current("digits CNN|HESSO|0.7|0", {"steps": steps - 1}, ["digits CNN"])
    assert _is_current("digits CNN|HESSO|0.7|0", {"steps": steps - 1}, ["small"])
    assert _is_current("small|planted|0", {}, ["small"])


def test_the_net_is_that_of_the_tutorial() -> None:
    model = ResNet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)
