"""The benchmark of scaling: its networks, its slope, and the page made of its results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from torchlathe.tools.bench import bench_scaling, scaling_page
from torchlathe.tools.bench.scaling_nets import NETS


def test_the_page_is_what_the_results_say() -> None:
    assert scaling_page.PAGE.read_text(encoding="utf-8") == scaling_page.scaling_page()


@pytest.mark.parametrize("name", list(NETS))
def test_every_net_is_measured(name: str) -> None:
    row = bench_scaling.measure(NETS[name], 40, rounds=1)
    assert 20 <= row["nodes"] <= 60
    assert set(row["seconds"]) == set(bench_scaling.STAGES)
    assert row["families"] > 3
    json.dumps(row)


def test_nodes_are_about_what_was_asked_for() -> None:
    row = bench_scaling.measure(NETS["transformer"], 200, rounds=1)
    assert row["nodes"] == pytest.approx(200, rel=0.1)


def test_slope_is_the_exponent() -> None:
    rows = [{"nodes": n, "seconds": {"erase": 3e-4 * n**1.5}} for n in (10, 100, 1000)]
    # Exact but for rounding of logarithms.
    assert math.isclose(bench_scaling.slope(rows, "erase"), 1.5, rel_tol=1e-9)


def test_a_small_run_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    words = ["--nets", "one dense block", "--most", "200", "--rounds", "1", "--json", str(path)]
    assert bench_scaling.main(words) == 0
    assert "slope" in capsys.readouterr().out
    assert "Over its *edges*" in scaling_page.scaling_page(path)
    scaling_page.draw(tmp_path / "scaling.svg", path)
    assert "one dense block" in (tmp_path / "scaling.svg").read_text()
    with pytest.raises(SystemExit):
        bench_scaling.main(["--nets", "round"])
