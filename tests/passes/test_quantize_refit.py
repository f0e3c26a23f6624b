"""Scales after a sweep: least squares for given numbers, and the better of two sweeps by row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlathe import PassManager, capture
from torchlathe.passes.rewrite.quantising.grids import Grid, fit_grid
from torchlathe.passes.rewrite.quantising.refitting import Rounded, refitted
from torchlathe.passes.rewrite.quantising.rounding import Rounding
from torchlathe.passes.rewrite.sweeping.sweep import sweep


def _layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and the moment of data that has few large directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    data = torch.randn(8 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), data.T @ data / len(data)


def _swept(weight: torch.Tensor, moment: torch.Tensor, grid: Grid) -> Rounded:
    rounding = Rounding(grid)
    sweep(weight, moment, rounding)
    return Rounded.of(grid, rounding.codes, weight, moment)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["int8", "int4", "int2", "mxfp4", "nvfp4", "fp8"]),
    st.sampled_from([0, 16, 48]),
    st.booleans(),
    st.sampled_from([64, 80]),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**31),
)
def test_no_row_is_worse_and_losses_are_true(
    name: str, group: int, symmetric: bool, columns: int, damping: float, seed: int
) -> None:
    weight, moment = _layer(6, columns, seed)
    weight[2] = 0
    weight[3, :16] = 0
    symmetric = symmetric or not name.startswith("int")
    grid = fit_grid(weight, name, group=group, symmetric=symmetric)
    swept = _swept(weight, moment, grid)
    before = Rounded.of(grid, swept.codes, weight, moment, damping)
    after = refitted(before, weight, moment, damping)
    assert torch.equal(before.codes, after.codes)
    assert bool((after.losses <= before.losses).all())
    # The sum that is taken off and the sum over are the same but for what float32 rounds: some
    # hundreds of products, the largest of the size of the first loss.
    again = Rounded.of(after.grid, after.codes, weight, moment, damping)
    size = float(before.losses.max())
    torch.testing.assert_close(again.losses, after.losses, rtol=1e-3, atol=1e-4 * size)
    # What is stored is what was reckoned with.
    assert torch.equal(after.grid.stored.to(after.grid.scales.dtype), after.grid.scales) or (
        after.grid.form.scales != "float"
    )
    assert torch.equal(after.grid.decoded(after.codes)[2], torch.zeros(columns))


@pytest.mark.parametrize("group", [0, 16])
def test_scales_are_those_of_least_squares(group: int) -> None:
    weight, moment = _layer(5, 64)
    weight, moment = weight.double(), moment.double()
    grid = fit_grid(weight, "int4", group=group)
    before = _swept(weight, moment, grid)
    found = refitted(before, weight, moment).grid.scales
    root = torch.linalg.cholesky(moment)
    numbers = replace(grid, scales=torch.ones_like(grid.scales)).decoded(before.codes)
    width = group or 64
    for row in range(5):
        parts = torch.block_diag(*numbers[row].split(width)).T  # (columns, groups)
        want = torch.linalg.lstsq(root.T @ parts, root.T @ weight[row]).solution
        # A pull towards the old scales of 1e-4, and of groups bf16: half of a 256th.
        torch.testing.assert_close(found[row], want, rtol=2**-9 + 2e-3 if group else 2e-3, atol=0)


def test_damping_is_a_larger_diagonal() -> None:
    weight, moment = _layer(5, 64)
    before = _swept(weight, moment, fit_grid(weight, "int4", group=16))
    larger = moment + 0.5 * moment.diagonal().mean() * torch.eye(64)
    pairs = [(moment, 0.5), (larger, 0.0)]
    one, two = (
        refitted(Rounded.of(before.grid, before.codes, weight, m, d), weight, m, d)
        for m, d in pairs
    )
    torch.testing.assert_close(one.losses, two.losses)
    torch.testing.assert_close(one.grid.scales, two.grid.scales, rtol=2**-7, atol=0)


def test_numbers_that_are_exact_keep_their_scales() -> None:
    weight, moment = _layer(4, 64)
    grid = fit_grid(weight, "int4", group=16, symmetric=False)
    exact = grid.decoded(grid.codes(weight))
    before = Rounded.of(grid, grid.codes(weight), exact, moment)
    assert torch.equal(refitted(before, exact, moment).grid.stored, grid.stored)


def test_rows_are_taken_from_the_better_of_two() -> None:
    weight, moment = _layer(40, 64)
    one, two = (
        _swept(weight, moment, fit_grid(weight, "int4", group=16, symmetric=False, clip=clip))
        for clip in ("mse", "none")
    )
    both = one.or_better(two)
    assert torch.equal(both.losses, torch.minimum(one.losses, two.losses))
    # Both are better somewhere, so that this is no matter of one of them.
    assert 0 < int((one.losses < two.losses).sum()) < 40
    again = Rounded.of(both.grid, both.codes, weight, moment)
    torch.testing.assert_close(again.losses, both.losses)


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_searched_ranges_lose_no_more_than_whole_ones(symmetric: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 48).eval()
    data = [torch.randn(100, 64) @ torch.randn(64, 64) for _ in range(3)]
    program = capture(model, (data[0],), dynamic_shapes="auto")
    errors = {}
    for clip in ("mse", "none"):
        spec = f"quantize{{scheme=w4a16,group=32,method=gptq,clip={clip},symmetric={symmetric}}}"
        after = PassManager(spec).run(program, calibration=data)
        (row,) = after.history[-1].details["quantised"]
        errors[clip] = row["output_error"]
    assert errors["mse"] <= errors["none"]
