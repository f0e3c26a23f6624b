"""The benchmark of compositions: its pipelines keep to their budgets, and its page to its rows."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import torchlathe as tl
from torchlathe.passes import parse_pipeline
from torchlathe.tools.bench import bench_composition, composition_page
from torchlathe.tools.bench.bench_composition import ALONE, PIPELINES, Task, pipeline


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 192), nn.ReLU(), nn.Linear(192, 64)]
    mix = torch.randn(16, 64)
    data = [torch.randn(32, 16) @ mix for _ in range(3)]
    program = tl.capture(nn.Sequential(*layers).eval(), (data[0],), dynamic_shapes="auto")
    return Task(program, data, lambda run: 1.0)


@pytest.mark.parametrize("way", list(PIPELINES))
def test_pipelines_keep_to_the_bytes(way: str, task: Task) -> None:
    whole, layers = task.program.cost().bytes, task.layers
    text = pipeline(way, 0.1, whole, layers)
    assert str(parse_pipeline(text)[0]).startswith(text.partition("{")[0])
    found = tl.PassManager(text, verify=False).run(task.program, calibration=task.data)
    share = 1 - (whole - found.cost().bytes) / layers
    # Biases of what was erased go too; ranks and groups are whole numbers.
    assert 0.04 < share <= 0.105


def test_four_bits_alone_are_what_composing_begins_with() -> None:
    text = pipeline("low rank, bits", 0.5, 1000, 900)
    assert text.startswith(
        "low-rank-split{bytes=1000,exclude=[]},"
    )  # nothing to take from the rank


def test_the_page_says_where_composing_is_better_and_where_not() -> None:
    ways = {way: 3.0 + 0.1 * i for i, way in enumerate(PIPELINES)}
    rows = [{"model": "characters", "way": "", "budget": 1.0, "share": 1.0, "score": 2.5}]
    for budget, change in ((0.1, 0.0), (0.05, -2.0)):
        for way, score in ways.items():
            moved = score if way in ALONE else score + change
            rows.append({"model": "characters", "way": way, "budget": budget, "share": budget,
                         "score": moved})  # fmt: skip
    rows.append(
        {"model": "characters", "way": "bits", "budget": 0.01, "share": None, "score": None}
    )
    text = composition_page.measured({"rows": rows, "cpu": "C", "threads": 1, "torch": "2"})
    assert "10%: *erase, bits* (3.300) is **not** better than the best alone, *erase*" in text
    assert "5%: *erase, bits* (1.300) is better than the best alone, *erase* (3.000)" in text
    assert "cannot be" in text


def test_the_page_is_what_the_results_say() -> None:
    if not bench_composition.RESULTS.is_file():
        pytest.skip("not measured yet")
    result = json.loads(bench_composition.RESULTS.read_text(encoding="utf-8"))
    page = composition_page.PAGE.read_text(encoding="utf-8")
    assert page.endswith(composition_page.measured(result))
