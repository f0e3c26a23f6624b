"""Low rank plus sparse: some rows as they are, the others by a product."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchlathe as tl
from tests.passes.moe_models import mixtral
from tests.passes.test_low_rank import Attention, Conv, captured, decayed, messages, run
from torchlathe.ir import OptionError
from torchlathe.passes import LowRankSplit
from torchlathe.passes.rewrite.factorising.plans import most_rank, plan_of
from torchlathe.passes.rewrite.factorising.remainders import (
    kept_rows,
    remainder_split,
    residual_rows,
)
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.factorising.splits import output_error, split, whitened_split


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """A matrix, a second moment of its inputs that may be singular, a rank, a number of rows."""
    outs, ins = draw(st.integers(2, 10)), draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(outs, ins, dtype=torch.float64, generator=generator)
    data = torch.randn(draw(st.integers(1, 20)), ins, dtype=torch.float64, generator=generator)
    return weight, data.T @ data / len(data), draw(st.integers(1, ins)), draw(st.integers(1, outs))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_its_error_is_that_of_the_outputs_and_no_more_than_without_rows(case: Any) -> None:
    weight, moment, rank, count = case
    found = remainder_split([weight], rank, count, inputs=[moment])
    scale = output_error(weight, torch.zeros_like(weight), moment)
    measured = output_error(weight, found.product(), moment)
    assert found.energy == pytest.approx(scale, rel=1e-9, abs=1e-12)
    assert found.error == pytest.approx(measured, abs=1e-9 * scale + 1e-12)
    plain = whitened_split(weight, moment, rank, damping=0.0)
    assert found.error <= plain.error + 1e-9 * scale
    assert torch.equal(found.product()[found.rows], weight[found.rows])


@settings(max_examples=25, deadline=None)
@given(cases())
def test_with_all_rows_it_is_the_matrix(case: Any) -> None:
    weight, moment, rank, _ = case
    found = remainder_split([weight], rank, len(weight), inputs=[moment])
    assert found.parts is None
    assert found.error == 0
    assert torch.equal(found.product(), weight)


def test_more_rows_never_lose_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, dtype=torch.float64, generator=generator)
    errors = [remainder_split([weight], 4, count).error for count in range(1, 24, 2)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(errors))


def test_rows_are_told_apart_by_energy_and_not_by_their_sum() -> None:
    """The official code of LoSparse drops the row (1, 0, 0, -1, 0, 0), since its sum is zero."""
    low = torch.outer(torch.arange(1.0, 9.0), torch.ones(6))
    sparse = torch.zeros(8, 6)
    sparse[3] = torch.tensor([1.0, 0, 0, -1, 0, 0])
    found = remainder_split([(low + sparse).double()], 1, 1)
    assert found.rows.tolist() == [3]
    assert found.error < 1e-12
    missed = residual_rows(sparse, torch.ones(1, 6), None)
    assert missed[3] == pytest.approx(2.0)
    assert (missed >= 0).all()


def test_planted_rows_are_found_in_every_expert_at_once() -> None:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts = [noise(20, 3) @ noise(3, 12) for _ in range(4)]
    for expert in experts:
        expert[[2, 11]] += 2 * noise(2, 12)
    found = remainder_split(experts, 3, 2)
    assert found.rows.tolist() == [2, 11]
    assert found.error < 1e-12 * found.energy
    for index, expert in enumerate(experts):
        torch.testing.assert_close(found.product(index), expert)


def test_weights_of_rows_decide_which_are_kept() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64)
    rows = torch.full((6,), 1e-3, dtype=torch.float64)
    rows[4] = 1e3
    assert 4 in remainder_split([weight], 1, 1, rows=[rows]).rows.tolist() or float(
        residual_rows(weight, split(weight, 1, rows=rows).down, None)[4]
    ) == pytest.approx(0, abs=1e-6)


def test_refusals_and_counts() -> None:
    with pytest.raises(ValueError, match="0 rows of 4"):
        remainder_split([torch.ones(4, 4)], 1, 0)
    assert [kept_rows(100, share) for share in (0.0, 0.001, 0.1, 1.0)] == [0, 1, 10, 100]
    with pytest.raises(OptionError, match="keep no rows"):
        LowRankSplit(remainder=0.1, joint=True)
    with pytest.raises(OptionError, match="remainder"):
        LowRankSplit(remainder=1.5)


@pytest.mark.parametrize("spec", ["share=0.6", "rank=6", "params=0.6,allocation=exact"])
def test_kept_rows_are_counted_and_exact(spec: str) -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    data = [torch.randn(8, 10, 32) for _ in range(3)]
    after = run(f"low-rank-split{{remainder=0.1,time=false,{spec}}}", program, calibration=data)
    record = after.history[-1]
    rows = [name for name in after.parameters if name.endswith(".rows.weight")]
    assert rows
    for name in rows:
        stem = name.removesuffix("rows.weight")
        down, up = after.tensor(f"{stem}down.weight"), after.tensor(f"{stem}up.weight")
        kept, order = after.tensor(name), after.tensor(f"{stem}order")
        dense = torch.cat([up @ down, kept]).index_select(0, order)
        old = program.tensor(f"{stem}weight")
        assert dense.shape == old.shape
        same = [i for i, row in enumerate(dense) if torch.equal(row, old[i])]
        assert len(same) >= kept_rows(len(old), 0.1)
        found = down.numel() + up.numel() + kept.numel()
        (site,) = [s for s in find_sites(program)[0] if s.weight == f"{stem}weight"]
        plan = plan_of([site], "svd", "matrix", len(down), kept=len(kept))
        assert plan is not None
        assert plan.parameters == found < old.numel()
        assert most_rank([site], kept=len(kept)) >= len(down)
    old_linears = int(record.statistics["parameters_of_layers"])
    new_linears = int(record.statistics["kept_of_layers"])
    saved = program.cost().parameters - after.cost().parameters
    assert saved == old_linears - new_linears
    x = torch.randn(4, 10, 32)
    error = (after.run(x) - program.run(x)).norm() / program.run(x).norm()
    assert error < 0.35  # a random answer would be off by about 1
    assert "rows as they are" in messages(after)


def test_convolutions_keep_output_channels() -> None:
    program = captured(decayed(Conv()), torch.randn(2, 8, 12, 12))
    after = run("low-rank-split{share=0.6,remainder=0.1,method=svd,time=false}", program)
    names = set(after.parameters)
    assert {"first.rows.weight", "line.rows.weight"} <= names
    assert "grouped.rows.weight" not in names
    x = torch.randn(3, 8, 12, 12)
    error = (after.run(x) - program.run(x)).norm() / program.run(x).norm()
    assert error < 0.35


def test_experts_keep_rows() -> None:
    share = 0.6
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(1))
    program = tl.capture(mixtral(), (), {"input_ids": ids})
    spec = f"low-rank-split{{include=[*experts*],share={share},remainder=0.1,time=false}}"
    after = run(spec, program, calibration=[{"input_ids": ids}])
    rows = [name for name in after.parameters if name.endswith("rows.weight")]
    assert rows
    assert all(after.tensor(name).dim() == 3 for name in rows)
    record = after.history[-1].statistics
    assert record["kept_of_layers"] <= share * record["parameters_of_layers"]
    logits, wanted = (p.run(input_ids=ids)[0] for p in (after, program))
    assert logits.shape == wanted.shape
    error = (logits - wanted).norm() / wanted.norm()
    assert error < 1.0  # that of zeros; random weights have no low rank


def test_mixed_keeps_rows_only_where_that_is_better() -> None:
    model = decayed(Attention())
    with torch.no_grad():
        model.up.weight[5] += 3 * torch.randn(32)
        model.up.weight[40] += 3 * torch.randn(32)
    program = captured(model, torch.randn(2, 10, 32))
    data = [torch.randn(8, 10, 32) for _ in range(3)]
    spec = "low-rank-split{method=mixed,share=0.4,weigh=layer,time=false,among=[whitened-svd]%s}"

    def lost(options: str) -> float:
        after = run(spec % options, program, calibration=data)
        profile = after.history[-1].details["layer_profile"]
        return sum(layer["chosen"]["error"] for layer in profile)

    assert lost(",remainder=0.03") <= lost("") * 1.01
