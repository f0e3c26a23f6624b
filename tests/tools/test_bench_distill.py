"""The benchmark of distillation: data, rows that are kept, statistics, and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchlathe.tools.bench import bench_distill
from torchlathe.tools.bench.distill_page import holm, measured, paired
from torchlathe.tools.bench.distilling.data import TASKS, size, split, width_for
from torchlathe.tools.bench.distilling.runs import ABLATIONS, METHODS, RATIO
from torchlathe.tools.bench.intervals import interval
from torchlathe.tools.bench.markdown import MARK


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_and_students(name: str) -> None:
    task = TASKS[name]
    one, other = split(task, 0), split(task, 1)
    assert len(one.train[1]) > len(one.test[1]) > 0
    assert not torch.equal(one.test[0], other.test[0])
    whole = size(task.net(task.width))
    student = task.net(width_for(task, whole / RATIO))
    # The paper's 10 to 15 times fewer.
    assert 10 <= RATIO <= whole / size(student) <= 15
    assert student(one.test[0][:3]).shape == (3, one.classes)


def test_paired_tests_and_their_correction() -> None:
    assert paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert paired([1.0, 2.0, 3.1], [0.0, 1.1, 2.0]) < 0.01
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    # Student's t of two degrees of freedom: 4.303.
    assert interval([1.0, 2.0, 3.0], 3) == "2.000 ± 2.484"


def test_rows_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def row(task: str, method: Any, seed: int) -> dict[str, float]:
        made.append((task, seed))
        return {"accuracy": 90.0 + seed, "ece": 5.0, "log_loss": 0.3, "parameters": 100}

    monkeypatch.setattr(bench_distill, "one_run", row)
    monkeypatch.setattr(bench_distill, "teacher_run", lambda task, seed: row(task, None, seed))
    file = tmp_path / "rows.json"
    assert bench_distill.main(["--seeds", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    extra = [
        m
        for _, methods in ABLATIONS.values()
        for m in methods.values()
        if m not in METHODS.values()
    ]
    assert len(result["rows"]) == 2 * (len(TASKS) * (len(METHODS) + 1) + len(extra))
    count = len(made)
    bench_distill.main(["--seeds", "2", "--json", str(file)])
    assert len(made) == count
    text = measured(result)
    for name in METHODS:
        assert f"| {name} |" in text
    for title in ABLATIONS:
        assert title[1:] in text
    assert "40 show no significant difference" in text


def test_the_page_is_made_of_the_results() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "distill.md"
    result = json.loads(bench_distill.RESULTS.read_text(encoding="utf-8"))
    _, mark, text = page.read_text(encoding="utf-8").partition(MARK)
    assert mark
    assert text == "\n" + measured(result)
