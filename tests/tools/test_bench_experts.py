"""The benchmark of merged experts: its models at work once, and the page of its results."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from torchlathe.ir import capture
from torchlathe.passes import ExpertLayers
from torchlathe.tools.bench import bench_experts
from torchlathe.tools.bench.experts import models, page


@pytest.mark.skipif(not page.RESULTS.exists(), reason="not measured yet")
def test_the_page_is_what_the_results_say() -> None:
    result = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert text.partition(page.MARK)[2].lstrip() == page.measured(result)


def test_the_order_counts_cells_and_not_draws() -> None:
    def row(method: str, seed: int, chance: int, loss: float) -> dict[str, object]:
        return {"task": "text", "method": method, "seed": seed, "chance": chance, "loss": loss,
                "experts": 4.0}  # fmt: skip

    rows = [
        row(name, seed, 0, 1.0 if name == "merge (default)" else 1.0 + math.log(2) * (-1) ** seed)
        for name in {name for claim in page._CLAIMS for name in claim}
        for seed in (0, 1)
    ]
    rows += [row("grouped at random", 0, 1, 5.0)]
    table = page._order(rows)
    assert "| merge (default) | not aligned | 1 of 2, 1.00 |" in table
    assert "| merge (default) | grouped at random | 1 of 2," in table


@pytest.mark.slow
def test_planted_copies_compute_the_same_and_can_be_told() -> None:
    language = models.planted_skills(0, 2, None)
    batch = language.calibration[0]
    program = capture(language.model, (), batch)
    assert len(program.analysis(ExpertLayers).layers) == 2
    language = dataclasses.replace(
        language, calibration=language.calibration[:1], test=language.test[:1]
    )
    planted = "clusters by weights, uniform budgets"
    only = {planted, "prune (default)"}
    rows = {r["method"]: r for r in bench_experts.rows(language, 4.0, only)}
    assert set(rows) == only
    assert rows[planted]["pairs"] == 1.0
    whole = language.loss(language.model)
    # Copies, once aligned, are the same numbers; their mean differs by rounding in float32.
    assert rows[planted]["loss"] == pytest.approx(whole, abs=1e-5)
    assert rows["prune (default)"]["pairs"] is None
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows.values())
