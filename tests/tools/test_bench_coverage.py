"""The benchmark of coverage: its list, its limits, and the page made of its results."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from torchlathe.tools.bench import bench_coverage, pages
from torchlathe.tools.bench.coverage import ours, peer, runner
from torchlathe.tools.bench.coverage.page import coverage_page
from torchlathe.tools.bench.coverage.summary import captured, summary, verdict
from torchlathe.tools.bench.coverage.zoo import ENTRIES

# Small ones of different kinds: windows, heads, experts, state space, recurrence, video.
QUICK = (
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/vit",
    "timm/convnextv2_atto",
    "timm/beit_base_patch16_224",
    "transformers/bert",
    "transformers/mixtral",
    "transformers/t5_encoder",
    "torch/bigru_tagger",
)
# Those that torch.export itself cannot capture, each for the reason that the page has.
UNCAPTURED = frozenset(
    f"transformers/{name}"
    for name in ("encodec", "led", "longformer", "nystromformer", "switch_transformers", "vilt")
)


def _row(name: str) -> dict[str, object]:
    row: dict[str, object] = {}
    ours.measure(ENTRIES[name], row.update)
    return row


def test_there_are_models_enough_of_every_package() -> None:
    counts = Counter(entry.package for entry in ENTRIES.values())
    assert sum(counts.values()) >= 150
    assert counts["torchvision"] >= 30
    assert counts["timm"] >= 60
    assert counts["transformers"] >= 70


@pytest.mark.parametrize("name", QUICK)
def test_quick_models_are_erased_and_agree(name: str) -> None:
    row = _row(name)
    assert verdict(row) == "ok", row
    assert row["ran_at"] == [2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENTRIES.keys() - set(QUICK) - UNCAPTURED))
def test_models_are_erased_and_agree(name: str) -> None:
    row = _row(name)
    assert verdict(row) == "ok", row


def test_equal_seeds_make_equal_models() -> None:
    entry = ENTRIES["transformers/bert"]
    first, second = entry.build().state_dict(), entry.build().state_dict()
    assert all(first[name].equal(second[name]) for name in first)
    assert any(not first[name].equal(t) for name, t in entry.build(seed=1).state_dict().items())


def test_torch_pruning_is_measured() -> None:
    pytest.importorskip("torch_pruning")
    row: dict[str, object] = {}
    peer.measure(ENTRIES["torchvision/squeezenet1_1"], row.update)
    assert row["outcome"] == "ok"
    assert row["same_shape"]


def test_a_process_over_its_limit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # No time by the clock at all, so that whatever runs is late.
    monkeypatch.setattr(runner, "WALL", 0)
    rows = {}
    runner.run_all([("torch/rnn_tagger", "ours")], lambda n, w, row: rows.update({n: row}))
    assert rows["torch/rnn_tagger"]["outcome"] == "timeout"


def test_relative_error_sees_shapes_and_infinities() -> None:
    import torch

    one = torch.ones(2, 3)
    assert ours.relative_error([one], [one]) == 0
    assert ours.relative_error([one], [one[:1]]) == float("inf")
    assert ours.relative_error([one / 0], [one]) == float("inf")
    assert ours.relative_error([-one / 0], [-one / 0]) == 0  # masks are infinite in both
    assert ours.relative_error([one * 1.5], [one]) == pytest.approx(0.5)


def test_the_page_is_what_the_results_say() -> None:
    text = (pages.RESULTS / "coverage_cpu.json").read_text(encoding="utf-8")
    assert pages.COVERAGE_PAGE.read_text(encoding="utf-8") == coverage_page(json.loads(text))


def test_the_results_reach_what_was_asked() -> None:
    text = (pages.RESULTS / "coverage_cpu.json").read_text(encoding="utf-8")
    models = json.loads(text)["models"]
    total = summary(models)
    assert total["captured"] >= 150
    assert total["share"] >= 0.97
    assert total["differs"] == 0
    optional = ("diffusers/", "torch_geometric/")  # listed where they are installed
    assert {name for name in models if not name.startswith(optional)} <= ENTRIES.keys()
    uncaptured = {name for name, row in models.items() if not captured(row["ours"])}
    assert uncaptured <= UNCAPTURED


def test_names_that_match_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_coverage.main(["--models", "torchvision/alexnot"])
    assert "no model is named torchvision/alexnot" in capsys.readouterr().err
