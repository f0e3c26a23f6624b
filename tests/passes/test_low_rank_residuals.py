"""Low rank plus a residual in few bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchlathe as tl
from tests.passes.test_low_rank import Attention, captured, decayed, messages, run
from torchlathe.ir import OptionError
from torchlathe.passes import LowRankSplit
from torchlathe.passes.rewrite.factorising.residuals import residual_split
from torchlathe.passes.rewrite.factorising.splits import output_error
from torchlathe.passes.rewrite.quantising.schemes import SCHEMES


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 20), st.integers(0, 2**20))
def test_the_product_never_makes_it_worse(outs: int, ins: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator)
    data = torch.randn(30, ins, generator=generator)
    moment = (data.T @ data / 30).double()
    found = residual_split(weight, rank, SCHEMES["w4a16"], inputs=moment)
    whole = output_error(weight, torch.zeros_like(weight), moment)
    measured = output_error(weight, found.product, moment) / whole
    assert found.error == pytest.approx(measured, rel=1e-3, abs=1e-9)
    # float32 factors leave some 1e-14 of the square.
    assert found.error <= found.alone * (1 + 1e-6) + 1e-12
    if rank >= min(outs, ins):
        assert found.error < 1e-11


@pytest.mark.parametrize("count", [None, 200.0])
def test_sweeping_loses_less_on_data_that_was_not_seen(count: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 48, generator=generator)
    seen, fresh = (
        torch.randn(200, 12, generator=generator) @ mix
        + 0.3 * torch.randn(200, 48, generator=generator)
        for _ in range(2)
    )
    weight = torch.randn(40, 48, generator=generator)
    moment, other = ((x.T @ x / len(x)).double() for x in (seen, fresh))
    found = {
        sweeps: residual_split(
            weight, 3, SCHEMES["w2a16"], inputs=moment, count=count, sweeps=sweeps
        )
        for sweeps in (True, False)
    }
    # 0.14 to 0.19 of both over four seeds.
    assert found[True].error < 0.3 * found[False].error
    swept, nearest = (output_error(weight, found[s].product, other) for s in (True, False))
    assert swept < 0.3 * nearest


def test_few_rows_are_not_swept_as_if_they_told_all() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(24, 64, generator=generator)
    seen, fresh = (torch.randn(n, 64, generator=generator) for n in (64, 4096))
    moment, other = ((x.T @ x / len(x)).double() for x in (seen, fresh))
    found = {
        count: residual_split(weight, 2, SCHEMES["w2a16"], inputs=moment, count=count)
        for count in (64.0, None)
    }
    errors = {c: output_error(weight, f.product, other) for c, f in found.items()}
    assert errors[64.0] < 0.6 * errors[None]  # 0.37 to 0.44 over four seeds


def test_layers_become_numbers_of_few_bits_and_a_product(tmp_path: Path) -> None:
    model = decayed(Attention())
    program = captured(model, torch.randn(2, 10, 32))
    data = [torch.randn(8, 10, 32) for _ in range(3)]
    after = run("low-rank-split{residual=w4a16,rank=3}", program, calibration=data)
    record = after.history[-1].statistics
    assert record["split"] == 5
    assert record["kept_bytes"] < 0.5 * record["bytes_of_layers"]
    assert record["mean_error"] < 0.6 * record["mean_error_without_product"]
    assert after.cost().bytes < 0.6 * program.cost().bytes
    assert "rank 3 and int4" in messages(after)
    assert {"query.down.weight", "query.up.weight"} <= set(after.parameters)
    x = torch.randn(4, 10, 32)
    whole = program.run(x).norm()
    error = (after.run(x) - program.run(x)).norm() / whole
    plain = run("quantize{scheme=w4a16}", program, calibration=data)
    assert error < (plain.run(x) - program.run(x)).norm() / whole
    compiled = tl.compile(
        model,
        "low-rank-split{residual=w4a16,rank=3}",
        (torch.randn(2, 10, 32),),
        dynamic_shapes="auto",
        calibration=data,
        measure_latency=False,
    )
    compiled.save(tmp_path / "model")
    assert torch.equal(tl.load(tmp_path / "model")(x), compiled(x))


def test_refusals() -> None:
    with pytest.raises(OptionError, match="rank says how large"):
        LowRankSplit(residual="w4a16")
    with pytest.raises(OptionError, match="residual goes with svd"):
        LowRankSplit(residual="w4a16", rank=4, method="fisher-weighted")
