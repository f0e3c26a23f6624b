"""The tensor functions of low-rank splits, held to what they say in float64."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from torchlathe.passes.rewrite.factorising.conv_splits import (
    cp_split,
    spatial_split,
    tucker_ranks,
    tucker_split,
)
from torchlathe.passes.rewrite.factorising.splits import (
    joint_split,
    output_error,
    rank_for,
    saves,
    spectrum,
    split,
    svd_split,
    whitened_split,
)

# Sums of some thousand products in float64, of numbers around one.
TIGHT = 1e-10

sizes = st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 40), st.integers(0, 10**6))


def drawn(case: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix, data (possibly fewer rows than features) and its second moment."""
    outs, ins, rows, seed = case
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    data = normal(rows, ins) * torch.logspace(0, -2, ins, dtype=torch.float64)
    return normal(outs, ins), data, data.T @ data / rows


@settings(max_examples=20)
@given(sizes, st.integers(1, 24))
def test_plain_split_is_that_of_eckart_and_young(case, rank) -> None:
    weight, _, _ = drawn(case)
    found = svd_split(weight, rank, randomised=False)
    discarded = torch.linalg.svdvals(weight)[rank:].square().sum()
    assert found.error == pytest.approx(float(discarded), abs=TIGHT)
    assert output_error(weight, found.product) == pytest.approx(float(discarded), abs=TIGHT)
    assert found.energy == pytest.approx(float(weight.square().sum()), rel=TIGHT)
    assert found.rank == min(rank, *weight.shape)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["wide", "tall"])
@pytest.mark.parametrize("randomised", [True, False], ids=["randomised", "exact"])
def test_what_a_split_is_given_stays_as_it_is(shape: tuple[int, int], randomised: bool) -> None:
    """It saves memory by writing over what it made itself, and over nothing else."""
    weight, _, moment = drawn((*shape, 20, 0))
    rows = torch.rand(shape[0], dtype=torch.float64)
    before = [x.clone() for x in (weight, moment, rows)]
    for inputs in (moment, None):
        for weights in (rows, None):
            split(weight, 3, inputs=inputs, rows=weights, damping=0.1, randomised=randomised)
            spectrum(weight, inputs=inputs, rows=weights, damping=0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, moment, rows), strict=True))


@settings(max_examples=20)
@given(sizes, st.integers(1, 24))
def test_whitened_error_is_the_output_error_and_the_discarded_values(case, rank) -> None:
    weight, data, moment = drawn(case)
    found = whitened_split(weight, moment, rank, damping=0.0, randomised=False)
    outputs = data @ (weight - found.product).T
    measured = float(outputs.square().sum() / len(data))
    assert found.error == pytest.approx(measured, abs=TIGHT)
    discarded = spectrum(weight, inputs=moment)[rank:].sum()
    assert found.error == pytest.approx(float(discarded), abs=TIGHT)
    plain = output_error(weight, svd_split(weight, rank).product, moment)
    assert found.error <= plain + TIGHT


@settings(max_examples=20)
@given(sizes)
def test_full_rank_is_the_matrix(case) -> None:
    weight, _, moment = drawn(case)
    for found in (svd_split(weight, 24), whitened_split(weight, moment, 24)):
        torch.testing.assert_close(found.product, weight, rtol=0, atol=1e-8)
        assert found.error == pytest.approx(0, abs=1e-6)


@settings(max_examples=20)
@given(sizes, st.integers(1, 24))
def test_weights_of_rows(case, rank) -> None:
    weight, _, moment = drawn(case)
    rows = torch.rand(weight.shape[0], dtype=torch.float64) + 0.1
    found = split(weight, rank, inputs=moment, rows=rows, randomised=False)
    scaled = rows.sqrt()[:, None] * weight, rows.sqrt()[:, None] * found.product
    assert found.error == pytest.approx(output_error(*scaled, moment), abs=TIGHT)
    other = whitened_split(weight, moment, rank, damping=0.0).product
    assert found.error <= output_error(scaled[0], rows.sqrt()[:, None] * other, moment) + TIGHT


@settings(max_examples=20)
@given(sizes, st.integers(1, 24), st.floats(0.01, 100))
def test_joint_is_the_split_of_the_stack(case, rank, scale) -> None:
    weight, _data, moment = drawn(case)
    other = torch.roll(weight, 1, 0)[: max(1, len(weight) // 2)] * 3
    ups, down, error, energy = joint_split(
        [weight, other], rank, inputs=moment, scales=[1.0, scale], damping=0.0
    )
    lost = [output_error(w, up @ down, moment) for w, up in zip((weight, other), ups, strict=True)]
    whole = [output_error(w, torch.zeros_like(w), moment) for w in (weight, other)]
    assert error == pytest.approx(lost[0] + scale * lost[1], abs=1e-8, rel=1e-6)
    assert energy == pytest.approx(whole[0] + scale * whole[1], rel=1e-8)


@settings(max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0, 1))
def test_a_rank_never_takes_more_than_its_share(outs, ins, share) -> None:
    rank = rank_for(outs, ins, share)
    assert rank * (outs + ins) <= share * outs * ins * (1 + 1e-12)
    assert 0 <= rank <= min(outs, ins)
    assert not saves(rank + 1, outs, ins) or (rank + 1) * (outs + ins) > share * outs * ins


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)], ids=str)
@pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])
def test_the_randomised_method_is_within_a_few_per_cent(shape, whitened) -> None:
    weight = torch.randn(shape)  # the flattest spectrum, on which it is at its worst
    data = torch.randn(400, shape[1]) * torch.logspace(0, -1, shape[1])
    inputs = (data.T @ data / 400).double() if whitened else None
    best = split(weight, 10, inputs=inputs, randomised=False)
    found = split(weight, 10, inputs=inputs)
    assert best.error <= found.error * (1 + 1e-6)
    assert found.error <= 1.02 * best.error
    # The factors are float32, the error is of the projection itself.
    assert found.error == pytest.approx(output_error(weight, found.product, inputs), rel=1e-4)
    again = split(weight, 10, inputs=inputs)
    assert torch.equal(again.up, found.up)


def test_factors_are_balanced_and_fall() -> None:
    found = svd_split(torch.randn(20, 30), 8)
    norms = found.up.norm(dim=0)
    torch.testing.assert_close(norms, found.down.norm(dim=1))
    assert (norms.diff() <= 1e-6).all()


def test_zeros_and_refusals() -> None:
    found = whitened_split(torch.zeros(6, 8), torch.eye(8), 2)
    assert not found.product.any()
    assert found.error == 0
    assert found.product.isfinite().all()
    found = whitened_split(torch.randn(6, 8), torch.zeros(8, 8), 2)
    assert found.product.isfinite().all()
    with pytest.raises(ValueError, match="rank of 0"):
        svd_split(torch.randn(3, 3), 0)


@settings(max_examples=12)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.data())
def test_spatial_split_against_conv2d(outs, ins, tall, wide, data) -> None:
    weight = torch.randn(outs, ins, tall, wide, dtype=torch.float64)
    x = torch.randn(2, ins, 7, 8, dtype=torch.float64)
    full = min(outs * wide, ins * tall)
    stride, padding = data.draw(st.tuples(st.integers(1, 2), st.integers(0, 2)))
    first, second = spatial_split(weight, full)
    between = F.conv2d(x, first, stride=(stride, 1), padding=(padding, 0))
    found = F.conv2d(between, second, stride=(1, stride), padding=(0, padding))
    wanted = F.conv2d(x, weight, stride=stride, padding=padding)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_tucker_against_conv2d_and_its_error_falls() -> None:
    weight = torch.randn(10, 8, 3, 3, dtype=torch.float64)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    errors = []
    for ranks in ((2, 3), (4, 6), (8, 10)):
        first, core, last = tucker_split(weight, *ranks)
        found = F.conv2d(F.conv2d(F.conv2d(x, first), core, padding=1), last)
        errors.append(float((found - F.conv2d(x, weight, padding=1)).square().sum()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-18 * x.numel() * 90
    hosvd = tucker_split(weight, 4, 6, sweeps=0)
    kept = [float(parts[1].square().sum()) for parts in (hosvd, tucker_split(weight, 4, 6))]
    assert kept[1] >= kept[0] * (1 - 1e-12)  # each sweep catches at least as much


@settings(max_examples=50)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 25), st.integers(1, 10**5))
def test_tucker_ranks_stay_within_the_budget(outs, ins, positions, budget) -> None:
    first, last = tucker_ranks(outs, ins, positions, budget)
    assert first <= ins
    assert last <= outs
    assert first * ins + first * last * positions + last * outs <= budget * (1 + 1e-9)


def cp_error(weight, parts) -> float:
    """Squared error of a canonical split as three convolutions in float64."""
    first, middle, last = (part.flatten(1).double() for part in parts)
    product = torch.einsum("or,rk,ri->oik", last, middle, first).reshape(weight.shape)
    return float((product - weight).square().sum())


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 30), st.integers(0))
def test_sweeps_never_raise_the_error_of_a_cp_split(outs, ins, wide, rank, seed) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    weight = torch.randn(outs, ins, 3, wide, dtype=torch.float64, generator=generator)
    errors = [cp_error(weight, cp_split(weight, rank, sweeps=n)) for n in (0, 3, 12)]
    scale = float(weight.square().sum())
    assert errors[0] + 1e-9 * scale >= errors[1] >= errors[2] - 1e-9 * scale
    # Before the sweeps, what is lost are the squared singular values that are left out.
    positions = torch.linalg.eigh(
        (flat := weight.flatten(2).permute(2, 0, 1).reshape(3 * wide, -1)) @ flat.T
    ).eigenvectors
    slices = torch.einsum("oik,kp->poi", weight.flatten(2), positions)
    values = torch.linalg.svdvals(slices).flatten().square().sort(descending=True).values
    assert errors[0] == pytest.approx(float(values[rank:].sum()), abs=1e-9 * scale)
    if rank >= min(outs, ins) * 3 * wide:
        assert errors[2] <= 1e-9 * scale


def test_cp_against_conv2d_and_planted_terms() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight = torch.einsum("or,ir,krl->oikl", normal(12, 4), normal(10, 4), normal(3, 4, 3))
    parts = cp_split(weight, 4, sweeps=200)
    x = normal(2, 10, 9, 9)
    first, middle, last = parts
    between = F.conv2d(F.conv2d(x, first), middle, padding=1, stride=2, groups=4)
    wanted = F.conv2d(x, weight, padding=1, stride=2)
    error = (F.conv2d(between, last) - wanted).norm() / wanted.norm()
    # Least squares in turn creep: sweeps end where one gains less than a thousandth.
    assert error < 0.05
    sizes = [part.flatten(1).norm(dim=1) for part in (first, middle)]
    torch.testing.assert_close(sizes[0], sizes[1])  # terms are balanced


def test_terms_that_would_cancel_are_not_taken() -> None:
    """A tensor of rank three that is a limit of tensors of rank two: terms would grow for ever."""
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(3, 2, 6, dtype=torch.float64, generator=generator)
    terms = [
        torch.einsum("o,i,k->oik", *(basis[j] for basis, j in zip(bases, term, strict=True)))
        for term in ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    cube = torch.stack(terms).sum(0)
    whole = float(cube.square().sum())
    errors = []
    for sweeps in (0, 3000):
        left, right, places = (
            part.flatten(1) for part in cp_split(cube[..., None], 2, sweeps=sweeps)
        )
        errors.append(cp_error(cube[..., None], (left, right, places)))
        sizes = left.norm(dim=1) * right.norm(dim=1) * places.norm(dim=0)
        assert float(sizes.square().sum()) <= 100 * whole * (1 + 1e-6)
    assert errors[1] < errors[0]
