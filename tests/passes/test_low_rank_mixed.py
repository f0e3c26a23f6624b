"""The mixed choice, budgets of time and of the whole model, and what a split tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from tests.passes.test_latency_table import Counting
from tests.passes.test_low_rank import Attention, Conv, Tied, captured, decayed, messages, run
from torchlathe.ir import Error, OptionError, Program
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.passes import LowRankSplit, PassContext
from torchlathe.passes.rewrite.factorising import timing
from torchlathe.passes.rewrite.factorising.choosing import Option, choose_exact
from torchlathe.passes.rewrite.factorising.metrics import collect_metrics
from torchlathe.passes.rewrite.factorising.plans import fits, most_rank, plan_of
from torchlathe.passes.rewrite.factorising.proving import (
    changes_of_outputs,
    changes_on_held_out,
    held_out,
)
from torchlathe.passes.rewrite.factorising.sites import Site, find_sites
from torchlathe.passes.statistics import Calibration
from torchlathe.tools.plots import profile_plot


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which an op takes time by the elements that it reads and writes."""
    monkeypatch.setattr(timing, "table_for", lambda program: LatencyTable(timer=Counting(1e-7)))
    monkeypatch.setattr(
        "torchlathe.passes.rewrite.factorising.low_rank.table_for",
        lambda program: LatencyTable(timer=Counting(1e-7)),
    )


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(8, 10, 32) for _ in range(count)]


def kronecker_model() -> nn.Module:
    """Two layers of few Kronecker products, which no product of two matrices is near."""
    torch.manual_seed(3)
    layers = [nn.Linear(36, 36), nn.Linear(36, 36)]
    with torch.no_grad():
        for layer in layers:
            terms = [torch.kron(torch.randn(6, 6), torch.randn(6, 6)) for _ in range(3)]
            layer.weight.copy_(torch.stack(terms).sum(0) / 10)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()


# -- what is chosen among --------------------------------------------------------------------------


def test_networks_are_chosen_where_the_matrix_is_one() -> None:
    program = captured(kronecker_model(), torch.randn(4, 36))
    data = [torch.randn(64, 36) for _ in range(3)]
    spec = "low-rank-split{method=mixed,share=0.3,time=false%s}"
    mixed = run(spec % "", program, calibration=data)
    products = run(spec % ",among=[svd,whitened-svd]", program, calibration=data)
    x = torch.randn(64, 36)
    with torch.no_grad():
        wanted = program.run(x)
        errors = [float((p.run(x) - wanted).norm() / wanted.norm()) for p in (mixed, products)]
    assert errors[0] < 1e-4 < 0.3 < errors[1]  # three Kronecker products are a bond of three
    assert "by tensor-train" in messages(mixed)
    assert {"0.core1.weight", "0.core2.weight"} <= set(mixed.parameters)


def test_the_mixed_choice_is_no_worse_than_any_of_its_methods() -> None:
    """In what it minimises; on other data anything may happen."""
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    data = batches()

    def lost(options: str) -> float:
        spec = f"low-rank-split{{share=0.5,weigh=layer,time=false,allocation=exact{options}}}"
        after = run(spec, program, calibration=data)
        profile = after.history[-1].details["layer_profile"]
        return sum(layer["chosen"]["error"] for layer in profile)

    mixed = lost(",method=mixed")
    # Errors of networks are estimated for the choice, those of products known.
    for other in ("", ",method=mixed,among=[svd]", ",method=mixed,among=[tensor-train]"):
        assert mixed <= lost(other) * 1.01


def test_a_mixed_choice_is_tried_against_fewer_methods() -> None:
    """Sums of what layers do alone may be wrong about what they do together; this is measured."""
    program = captured(kronecker_model(), torch.randn(4, 36))
    data = [torch.randn(64, 36) for _ in range(3)]
    after = run("low-rank-split{method=mixed,share=0.3,time=false}", program, calibration=data)
    (line,) = [text for text in messages(after).splitlines() if "change of the outputs" in text]
    told = [float(part.split()[-1]) for part in line.partition("among: ")[2].split(", ")]
    assert len(told) >= 2
    assert told[0] == min(told) < 0.01 < max(told)


def test_every_fourth_batch_is_held_out(tmp_path) -> None:
    program = captured(kronecker_model(), torch.randn(4, 36))
    data = [torch.full((4, 36), float(i)) for i in range(9)]
    given = Calibration(data, limit_bytes=5, resume=tmp_path)
    for calibration in (data, given):
        parts = held_out(PassContext(program, calibration=calibration))
        assert parts is not None
        most, few = ([int(batch[0, 0]) for batch, *_ in part.batches()] for part in parts)
        assert (most, few) == ([0, 1, 2, 4, 5, 6, 8], [3, 7])
        settings_of = Calibration.of(parts[0].calibration)
        assert settings_of.resume is None  # a saved state is one of all batches
    assert settings_of.limit_bytes == 5
    assert given.resume == tmp_path
    for short in (None, data[:3], iter(data)):
        assert held_out(PassContext(program, calibration=short)) is None


def test_choices_are_tried_on_data_that_their_factors_are_not_made_of() -> None:
    """Few samples: all but free on those that were seen, and not at all on others."""
    torch.manual_seed(0)
    program = captured(nn.Sequential(nn.Linear(32, 32, bias=False)).eval(), torch.randn(2, 32))
    data = [torch.randn(2, 32) for _ in range(4)]
    ctx = PassContext(program, "low-rank-split", data)
    sites = find_sites(program)[0]
    metrics = collect_metrics(program, ctx, sites, "mixed")
    plan = plan_of(sites, "whitened-svd", "matrix", 8)
    assert plan is not None
    (seen,), made = changes_of_outputs(program, ctx, [[plan]], metrics, 1e-6)
    (unseen,), none = changes_on_held_out(program, ctx, [[plan]], metrics, "mixed", 1e-6)
    assert list(made) == [plan]
    assert not none  # those that were tried are not of all the data
    assert seen < 1e-3 < 0.1 < unseen


def test_layers_that_can_be_split_together_are_also_tried_together() -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    after = run(
        "low-rank-split{method=mixed,share=0.4,time=false}", program, calibration=batches(8)
    )
    assert "joint wherever possible" in messages(after)


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sites = [Site(f"w{i}", "linear", (), (8, 8)) for i in range(30)]
    generator = torch.Generator().manual_seed(0)
    options = [Option((site,), None, 1.0, 0.0) for site in sites]
    for site in sites:
        for _ in range(12):
            cost, loss = torch.rand(2, generator=generator).tolist()
            options.append(Option((site,), None, cost, loss))
    choose_exact(options, 12.0)
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_cp_is_a_form_of_convolutions() -> None:
    program = captured(decayed(Conv()), torch.randn(2, 8, 12, 12))
    after = run(
        "low-rank-split{share=0.7,convolutions=cp,method=svd,allocation=uniform,time=false}",
        program,
    )
    assert after.tensor("first.core.weight").shape[1:] == (1, 3, 3)
    assert after.tensor("line.core.weight").shape[1:] == (1, 5)
    assert after.tensor("point.down.weight").dim() == 4  # 1 x 1 stays a matrix
    x = torch.randn(3, 8, 12, 12)
    error = (after.run(x) - program.run(x)).norm() / program.run(x).norm()
    assert error < 0.35
    record = after.history[-1].statistics
    assert record["kept_of_layers"] <= 0.7 * record["parameters_of_layers"]


class Weights:
    """Stands for a program that has one tensor."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def tensor(self, name: str) -> torch.Tensor:
        return torch.empty(self.shape)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["linear", "convolution", "experts"]),
    st.sampled_from(["matrix", "spatial", "tucker", "cp"]),
    st.lists(st.integers(1, 12), min_size=4, max_size=4),
    st.integers(1, 40),
    st.integers(0, 3),
)
def test_no_plan_is_larger_than_what_it_splits(
    kind: Any, form: Any, sizes: list[int], rank: int, kept: int
) -> None:
    """And its factors have as many elements as it says."""
    shape = tuple(sizes[: {"linear": 2, "convolution": 4, "experts": 3}[kind]])
    site = Site("w", kind, (), shape, groups=shape[0] if kind == "experts" else 1)
    form = form if fits(site, form) else "matrix"
    kept = min(kept, site.outs - 1) if form == "matrix" else 0
    plan = plan_of([site], "svd", form, rank, kept=kept)
    if plan is None:
        assert rank > most_rank([site], form, kept=kept) or form == "tucker"
        return
    factors: Any = timing.blank(plan, Weights(shape))  # type: ignore[arg-type]
    parts = [*factors.shared, *factors.own, *([] if factors.rows is None else [factors.rows])]
    assert sum(part.numel() for part in parts) == plan.parameters < site.parameters


# -- how much ----------------------------------------------------------------------------------


class Words(nn.Module):
    """More than half of its parameters are those of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 32)
        self.mix = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(self.embed(ids)).mean(1)


@pytest.mark.parametrize("allocation", ["auto", "uniform"])
def test_params_is_a_share_of_the_whole_model(allocation: str) -> None:
    """As for every pass; embeddings are split too, since they are what there is."""
    program = captured(decayed(Words()), torch.randint(0, 200, (2, 7)))
    data = [torch.randint(0, 200, (4, 7)) for _ in range(3)]
    spec = f"low-rank-split{{method=whitened-svd,params=0.5,allocation={allocation}}}"
    after = run(spec, program, calibration=data)
    assert after.cost().parameters <= 0.5 * program.cost().parameters
    assert "embed.down.weight" in after.parameters
    with pytest.raises(Error, match="does not split takes"):
        run("low-rank-split{params=0.5,embeddings=false}", program, calibration=data)
    layers = run("low-rank-split{share=0.5}", program, calibration=data)
    assert "embed.weight" in layers.parameters


def test_bytes_count_the_places_of_kept_rows() -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    for allocation in ("uniform", "exact"):
        spec = f"low-rank-split{{bytes=0.6,remainder=0.1,allocation={allocation},time=false}}"
        after = run(spec, program, calibration=batches())
        assert after.cost().bytes <= 0.6 * program.cost().bytes


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize("method", ["whitened-svd", "mixed,among=[whitened-svd,joint]"])
def test_a_budget_of_time_is_kept(method: str) -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    spec = f"low-rank-split{{method={method},latency=0.85,weigh=layer}}"
    after = run(spec, program, calibration=batches())
    before, found = (LatencyTable(timer=Counting(1e-7)).whole(p)[0] for p in (program, after))
    assert found <= 0.85 * 1.02 * before
    assert "a run takes" in messages(after)
    x = torch.randn(4, 10, 32)
    assert (after.run(x) - program.run(x)).norm() < program.run(x).norm()


@pytest.mark.usefixtures("counting")
def test_a_budget_of_time_that_cannot_be_kept_is_told() -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    with pytest.raises(Error, match=r"latency=0.01 leaves .* ms, but what the pass does not split"):
        run("low-rank-split{latency=0.01,weigh=layer}", program, calibration=batches())
    with pytest.raises(OptionError, match="allocation=uniform does not go with latency"):
        LowRankSplit(latency="5ms", allocation="uniform")


def test_contradictions_are_refused() -> None:
    with pytest.raises(OptionError, match="params and rank all say how much"):
        LowRankSplit(params=0.5, rank=3)
    with pytest.raises(OptionError, match="set method=mixed"):
        LowRankSplit(among=("svd",))


# -- what is told ------------------------------------------------------------------------------


def test_splits_that_are_slower_are_named_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = LatencyTable(timer=Counting(0.0))  # each op takes as long: two take twice as long
    for module in ("timing", "low_rank"):
        name = f"torchlathe.passes.rewrite.factorising.{module}.table_for"
        monkeypatch.setattr(name, lambda program: slow)
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    after = run("low-rank-split{rank=4,method=svd,include=[query,key]}", program)
    told = [d for d in after.history[-1].diagnostics if d["severity"] == "warning"]
    assert len(told) == 1
    text = str(told[0]["message"])
    assert "2 of 2 splits do not pay in time: with 20 rows of input (cpu" in text
    assert "query.weight (2.0x), key.weight (2.0x)" in text
    silent = run("low-rank-split{rank=4,method=svd,include=[query],time=false}", program)
    assert "pay in time" not in messages(silent)


def test_the_profile_of_layers_is_recorded_and_drawn() -> None:
    model = decayed(Attention())
    compiled = tl.compile(
        model,
        "low-rank-split{method=mixed,share=0.5,remainder=0.1,time=false}",
        (torch.randn(2, 10, 32),),
        dynamic_shapes="auto",
        calibration=batches(),
        measure_latency=False,
    )
    (record,) = compiled.report.passes
    profile: list[dict[str, Any]] = record["details"]["layer_profile"]
    assert [layer["weight"] for layer in profile] == [
        f"{name}.weight" for name in ("query", "key", "value", "up", "down")
    ]
    names = {name for layer in profile for name in layer["methods"]}
    assert {"svd", "whitened-svd", "whitened-svd + rows", "joint", "tensor-train"} <= names
    for layer in profile:
        assert layer["chosen"]["method"] in {"dense", *layer["methods"]}
        # What is fitted to data is estimated for the choice, and measured where it is chosen.
        guessed = {"tensor-train", "kronecker", "whitened-svd + rows", "svd + rows"}
        assert set(layer["estimated"]) == guessed & set(layer["methods"])
        assert ("expected" in layer["chosen"]) == (layer["chosen"]["method"] in guessed)
        for curve in layer["methods"].values():
            assert 1 <= len(curve) <= 12
            assert all(0 < share < 1 and error >= 0 for share, error in curve)
    drawing = profile_plot(compiled.report)
    assert drawing.startswith("<svg")
    assert "tensor-train (estimated)" in drawing
    assert "How layers were split" in compiled.report.to_html()


def test_a_tied_embedding_is_split_once_under_a_budget_of_the_whole() -> None:
    program: Program = captured(decayed(Tied()), torch.randint(0, 60, (2, 7)))
    after = run(
        "low-rank-split{params=0.7}", program, calibration=[torch.randint(0, 60, (4, 7))] * 2
    )
    assert after.cost().parameters <= 0.7 * program.cost().parameters
