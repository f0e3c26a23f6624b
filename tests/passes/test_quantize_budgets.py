"""quantize under budgets of time and of bytes, on a clock that counts instead."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.passes.test_latency_table import Counting
from tests.passes.test_quantize import tied
from torchlathe import PassManager
from torchlathe.ir import Error, OptionError
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.passes import FuseKernels, Quantize
from torchlathe.passes.rewrite.factorising.choosing import Option, choose_exact
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.quantising.schemes import scheme_of
from torchlathe.passes.rewrite.quantising.timing import SchemeTimes


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose clock counts elements, and ops that are chosen by rule."""
    monkeypatch.setattr(
        "torchlathe.passes.rewrite.factorising.timing.table_for",
        lambda program: LatencyTable(timer=Counting(1e-7)),
    )
    monkeypatch.setattr(
        "torchlathe.passes.rewrite.lowering.fuse_kernels.FuseKernels",
        functools.partial(FuseKernels, choose="rule"),
    )


@pytest.mark.usefixtures("counting")
def test_seconds_of_a_scheme_are_what_the_sum_of_ops_differs_by() -> None:
    _, program, _ = tied()
    sites = [s for s in find_sites(program)[0] if s.kind == "linear"]
    reports: list[str] = []
    times = SchemeTimes.of(program, sites, reports.append)
    scheme = scheme_of("w8a8", None, None, "quantize")
    site = next(s for s in sites if s.weight == "out.weight")
    alone = PassManager(["quantize{include=[out]}", FuseKernels(choose="rule")], verify=False).run(
        program
    )
    table = times.timed.table
    gap = table.program(alone).seconds - table.program(program).seconds
    assert times.seconds(site, scheme) == pytest.approx(times.dense[site] + gap, rel=1e-9)
    # Layers of one shape with like neighbours are timed once.
    count = len(reports)
    for name in ("query.weight", "key.weight", "value.weight"):
        times.seconds(next(s for s in sites if s.weight == name), scheme)
    assert len(reports) == count + 1


@pytest.mark.usefixtures("counting")
def test_a_budget_of_time_is_kept() -> None:
    _, program, data = tied()
    sites = [s for s in find_sites(program)[0] if s.kind == "linear"]
    times = SchemeTimes.of(program, sites, lambda _: None)
    schemes = [scheme_of(name, None, None, "quantize") for name in ("w8a8", "w4a8")]
    least = sum(min(times.dense[s], *(times.seconds(s, x) for x in schemes)) for s in sites)
    # Half of what the fastest choice gains.
    asked = (times.whole(least) + times.timed.whole) / 2 / times.timed.whole
    assert asked < 1
    spec = f"quantize{{latency={asked},schemes=[w8a8,w4a8]}}"
    after = PassManager(spec).run(program, calibration=data)
    statistics = after.history[-1].statistics
    assert float(statistics["expected_seconds"]) <= float(statistics["seconds_allowed"]) * (
        1 + 1e-9
    )
    assert statistics["left_dense"] > 0
    assert len(after.history[-1].details["quantised"]) > 0
    with pytest.raises(Error, match=r"ms is the least that these layers and schemes allow|leaves"):
        PassManager("quantize{latency=0.01}").run(program, calibration=data)


@pytest.mark.usefixtures("counting")
def test_two_budgets_at_once() -> None:
    _, program, data = tied()
    spec = "quantize{bytes=0.6,latency=60s,schemes=[w8a8,w4a16]}"
    after = PassManager(spec).run(program, calibration=data)
    statistics = after.history[-1].statistics
    assert after.cost().bytes <= 0.6 * program.cost().bytes
    assert 0 < float(statistics["expected_seconds"]) < float(statistics["seconds_allowed"])
    # Four bits are the smaller, eight the faster ones: not both at once.
    sites = [s for s in find_sites(program)[0] if s.kind == "linear"]
    times = SchemeTimes.of(program, sites, lambda _: None)
    eight = scheme_of("w8a8", None, None, "quantize")
    least = sum(min(times.dense[s], times.seconds(s, eight)) for s in sites)
    asked = times.whole(least) * 1.02 / times.timed.whole
    four = PassManager("quantize{scheme=w4a16}").run(program).cost().bytes
    spec = f"quantize{{bytes={int(four * 1.02)}B,latency={asked},schemes=[w8a8,w4a16]}}"
    with pytest.raises(Error, match="no choice of schemes is within both bytes and latency"):
        PassManager(spec).run(program, calibration=data)


def test_two_budgets_are_met_exactly() -> None:
    sites = find_sites(tied()[1])[0][:4]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        options = [
            Option((site,), None, float(cost), float(loss))
            for site in sites
            for cost, loss in torch.rand(4, 2, generator=generator).tolist()
        ]
        second = dict(zip(options, torch.rand(16, generator=generator).tolist(), strict=True))
        rows = [options[4 * i : 4 * i + 4] for i in range(4)]
        best = None
        for choice in torch.cartesian_prod(*[torch.arange(4)] * 4).tolist():
            chosen = [row[place] for row, place in zip(rows, choice, strict=True)]
            if sum(o.cost for o in chosen) <= 1.6 and sum(second[o] for o in chosen) <= 1.6:
                loss = sum(o.loss for o in chosen)
                best = loss if best is None else min(best, loss)
        found = choose_exact(options, 1.6, also=[(second, 1.6)])
        if best is None:
            assert not found
        else:
            assert sum(o.loss for o in found) == pytest.approx(best, rel=1e-5)


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(OptionError, match="latency"):
        Quantize(latency="soon")
    assert Quantize(latency="5ms").spec() == "quantize{latency=5ms}"
