"""The benchmark of erasing: its cases, its arguments, and the page made of its results."""

from __future__ import annotations

import json

import pytest
import torch

from torchlathe.tools.bench import bench_erase, pages
from torchlathe.tools.bench.erase_cases import CASES, COVERAGE, Case


def test_the_page_is_what_the_results_say() -> None:
    assert pages.PAGE.read_text(encoding="utf-8") == pages.benchmarks_page()


def test_names_are_unique() -> None:
    names = [*CASES, *(case.name for case in COVERAGE)]
    assert len(set(names)) == len(names)


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_erase.main(["--models", "resnet50,alexnet"])
    assert "unknown models alexnet" in capsys.readouterr().err


def test_one_case_is_measured() -> None:
    pytest.importorskip("torch_pruning")
    case = Case(
        "tiny",
        lambda: torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        ),
        lambda: ((torch.randn(2, 6),), {}),
        ({0: torch.export.Dim.DYNAMIC},),
        lambda model: {"ignored_layers": [model.get_submodule("2")]},
    )
    row = bench_erase.measure_case(case, rounds=2)
    json.dumps(row)
    assert row["parameters"] == 163
    assert row["parameters_after"] < 163
    assert row["peer_parameters_after"] < 163
    assert row["total_s"]["p20"] <= row["total_s"]["p50"] <= row["total_s"]["p80"]
    assert row["ratio"] == row["total_s"]["p50"] / row["peer_s"]["p50"]


def test_a_wrong_erase_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program, verify="off"):
        after = managed(program, verify)
        name = next(iter(after.parameters))
        with after.edit() as edit:
            edit.set_tensor(name, after.entries[name].tensor.detach() + 1)
        return after

    managed = bench_erase.managed
    monkeypatch.setattr(bench_erase, "managed", wrong)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    case = Case("tiny", lambda: model, lambda: ((torch.randn(2, 6),), {}), None)
    with pytest.raises(RuntimeError, match="differs from its zeroed twin"):
        bench_erase.measure_case(case, rounds=1)
