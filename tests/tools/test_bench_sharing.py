"""The measured part of docs/sharing.md is what the result file says."""

import json
from pathlib import Path

from torchlathe.tools.bench.bench_sharing import RESULTS
from torchlathe.tools.bench.sharing.page import MARK, measured

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharing.md"


def test_the_page_is_generated_from_the_results() -> None:
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8").partition(MARK)[2] == "\n" + measured(result)


def test_the_coloring_is_best_or_equal_at_each_size() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["fidelity"]
    for share in {row["share"] for row in rows}:
        here = {row["who"]: row for row in rows if row["share"] == share}
        mine = here["colouring"]
        # Its cost is the least by construction; the measured cosine is what the page tells.
        assert all(mine["cost"] <= r["cost"] for r in here.values() if r["curvature"] == "outputs")
        assert mine["cosine"] >= max(row["cosine"] for row in here.values()) - 1e-4
