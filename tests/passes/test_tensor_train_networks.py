"""The tensor functions of tensor trains and Kronecker sums, held to what they say in float64."""

import itertools
from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from torchlathe.passes.rewrite.factorising.splits import output_error, svd_split
from torchlathe.passes.rewrite.tensor_networks.contracting import (
    contraction,
    in_order,
    row_flops,
    run_contraction,
    train_terms,
)
from torchlathe.passes.rewrite.tensor_networks.fitting import fit
from torchlathe.passes.rewrite.tensor_networks.modes import (
    balanced_modes,
    factorisations,
    fits_structure,
)
from torchlathe.passes.rewrite.tensor_networks.plans import (
    bond_within,
    modes_of,
    network_cores,
    network_error,
    network_plan,
    network_plans,
)
from torchlathe.passes.rewrite.tensor_networks.trains import (
    Train,
    apply_train,
    dense,
    full_bonds,
    input_factors,
    kronecker_sum,
    tensor_train,
    train_parameters,
)

# Sums of some thousand products in float64, of numbers around one.
TIGHT = 1e-9

mode = st.integers(1, 4)
seeds = st.integers(0, 10**6)


def networks(most: int, sites: int) -> st.SearchStrategy:
    def modes(count: int) -> st.SearchStrategy:
        return st.lists(st.integers(1, most), min_size=count, max_size=count)

    return st.integers(2, sites).flatmap(lambda n: st.tuples(modes(n), modes(n), seeds))


cases, small = networks(4, 4), networks(3, 3)


def normal(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def drawn(case: tuple[list[int], list[int], int]) -> torch.Tensor:
    outs, ins, seed = case
    return normal(seed, prod(outs), prod(ins))


def moment_of(seed: int, ins: int, rows: int = 30) -> torch.Tensor:
    data = normal(seed + 1, rows, ins) * torch.logspace(0, -1, ins, dtype=torch.float64)
    return data.T @ data / rows


@settings(max_examples=30)
@given(cases, st.integers(1, 12))
def test_squared_error_is_the_sum_of_the_squared_discarded_values(case, bond) -> None:
    matrix = drawn(case)
    train = tensor_train(matrix, case[0], case[1], bond=bond)
    lost = float((matrix - train.matrix).square().sum())
    assert train.error == pytest.approx(lost, abs=TIGHT, rel=TIGHT)
    assert train.energy == pytest.approx(float(matrix.square().sum()), rel=TIGHT, abs=TIGHT)
    assert all(b <= bond for b in train.bonds)
    assert train.parameters == train_parameters(case[0], case[1], train.bonds)


@settings(max_examples=20)
@given(small)
def test_error_falls_with_the_bond_and_is_none_at_the_full_one(case) -> None:
    matrix = drawn(case)
    most = max(full_bonds(case[0], case[1]))
    errors = [tensor_train(matrix, case[0], case[1], bond=b).error for b in range(1, most + 1)]
    # A larger bond at the first cut keeps a superset, and every later cut sees at least as much.
    assert all(b <= a + TIGHT * (1 + a) for a, b in itertools.pairwise(errors))
    whole = tensor_train(matrix, case[0], case[1])
    assert whole.bonds <= full_bonds(case[0], case[1])
    torch.testing.assert_close(whole.matrix, matrix, rtol=0, atol=1e-7)


@settings(max_examples=20)
@given(cases, st.floats(0.05, 0.9))
def test_an_error_budget_is_kept(case, error) -> None:
    matrix = drawn(case)
    train = tensor_train(matrix, case[0], case[1], error=error)
    assert float((matrix - train.matrix).norm()) <= error * float(matrix.norm()) + TIGHT


@settings(max_examples=20)
@given(cases, st.integers(1, 6))
def test_whitened_error_is_that_of_the_outputs(case, bond) -> None:
    """Exactly so where the second moment is a Kronecker product over the legs."""
    matrix = drawn(case)
    parts = [moment_of(case[2] + k, extent) for k, extent in enumerate(case[1])]
    parts = [part + 0.1 * torch.eye(len(part), dtype=part.dtype) for part in parts]
    moment = parts[0]
    for part in parts[1:]:
        moment = torch.kron(moment, part)
    factors = input_factors(moment, case[1], damping=0.0)
    train = tensor_train(matrix, case[0], case[1], bond=bond, factors=factors)
    lost = output_error(matrix, train.matrix, moment)
    assert train.error == pytest.approx(lost, abs=1e-7, rel=1e-7)
    plain = output_error(matrix, tensor_train(matrix, case[0], case[1], bond=bond).matrix, moment)
    if len(case[0]) == 2:  # one cut, which is the best there is
        assert lost <= plain + 1e-7


@settings(max_examples=15)
@given(small, st.integers(1, 4), st.booleans())
def test_fitting_never_loses_more(case, bond, few) -> None:
    matrix = drawn(case)
    ins = prod(case[1])
    moment = moment_of(case[2], ins, rows=max(1, ins // 2) if few else 3 * ins)
    train = tensor_train(matrix, case[0], case[1], bond=bond)
    before = output_error(matrix, train.matrix, moment)
    factors = input_factors(moment, case[1])
    errors = [before]
    for sweeps in (1, 2):
        cores = fit(train.cores, matrix, moment, factors=factors, sweeps=sweeps, steps=4)
        assert [c.shape for c in cores] == [c.shape for c in train.cores]
        errors.append(output_error(matrix, dense(cores), moment))
    scale = output_error(matrix, torch.zeros_like(matrix), moment)
    assert all(b <= a + 1e-7 * scale for a, b in itertools.pairwise(errors))


def test_fitting_one_core_reaches_the_least_squares_solution() -> None:
    """Two sites with a trivial second one: all of the matrix is in the first core."""
    matrix, moment = normal(0, 6, 8), moment_of(0, 8)
    start = [torch.zeros(1, 6, 8, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1).double()]
    factors = input_factors(moment, (8, 1))
    cores = fit(start, matrix, moment, factors=factors, sweeps=1, steps=30)
    assert output_error(matrix, dense(cores), moment) < 1e-12


@settings(max_examples=20)
@given(cases, st.integers(1, 5), st.integers(1, 6))
def test_every_order_of_contraction_is_the_dense_product(case, bond, rows) -> None:
    outs, ins, seed = case
    train = tensor_train(drawn(case), outs, ins, bond=bond)
    x = normal(seed, rows, prod(ins))
    expected = x @ train.matrix.T
    torch.testing.assert_close(apply_train(train.cores, x), expected, rtol=0, atol=TIGHT)
    terms, extents, output = train_terms(outs, ins, train.bonds, rows)
    cores = list(train.cores)
    cores[0], cores[-1] = cores[0].squeeze(0), cores[-1].squeeze(-1)
    operands = [x.reshape(rows, *ins), *cores]
    orders = [
        contraction(terms, extents, output),
        contraction(terms, extents, output, apart=0),
        contraction(terms, extents, output, whole=False),
        in_order(terms, range(1, len(terms)), extents, output),
    ]
    for order in orders:
        found = run_contraction(order, operands).reshape(rows, -1)
        torch.testing.assert_close(found, expected, rtol=0, atol=TIGHT)
    assert orders[0].seconds <= min(order.seconds for order in orders) * (1 + 1e-9)
    # The second builds the matrix, and then meets it.
    last = orders[1].steps[-1]
    assert 0 in (last.left, last.right)
    assert row_flops(outs, ins, train.bonds) <= orders[3].flops // rows


def test_few_rows_are_contracted_and_many_get_the_matrix() -> None:
    orders = [contraction(*train_terms((16, 24), (16, 24), (40,), rows)) for rows in (1, 10**4)]
    first, last = (order.steps[-1] for order in orders)
    assert "mAB" not in first.legs
    assert "mAB" in last.legs
    few, many = orders
    assert many.flops < 2 * 10**4 * 384 * 384 * 1.1 < 10**4 * few.flops


@settings(max_examples=20)
@given(st.tuples(mode, mode), st.tuples(mode, mode), st.integers(1, 5), seeds)
def test_kronecker_sums(first, second, terms, seed) -> None:
    """They apply as the dense matrix does, and find a sum of so many products again."""
    a, b = normal(seed, terms, *first), normal(seed + 1, terms, *second)
    matrix = sum(torch.kron(a[k], b[k]) for k in range(terms))
    assert isinstance(matrix, torch.Tensor)
    left, right, error = kronecker_sum(matrix, first, terms)
    assert error == pytest.approx(0, abs=1e-7)
    again = torch.einsum("rab,rcd->acbd", left, right).reshape(matrix.shape)
    torch.testing.assert_close(again, matrix, rtol=0, atol=1e-6)
    x = normal(seed + 2, 3, first[1] * second[1])
    rows = x.reshape(3, first[1], second[1])
    applied = torch.einsum("rab,mbd,rcd->mac", left, rows, right).reshape(3, -1)
    torch.testing.assert_close(applied, x @ matrix.T, rtol=0, atol=1e-6)


def test_a_sum_of_kronecker_products_is_tiny_where_a_low_rank_is_not() -> None:
    """The fact of section 0.4: six products are found exactly, and fill the singular values."""
    matrix = sum(torch.kron(normal(k, 8, 6), normal(k + 9, 6, 8)) for k in range(6))
    assert isinstance(matrix, torch.Tensor)
    train = tensor_train(matrix, (8, 6), (6, 8), bond=6)
    rank = train.parameters // sum(matrix.shape)
    assert train.error < 1e-9 * train.energy
    assert svd_split(matrix, rank).error > 0.3 * train.energy


@settings(max_examples=40)
@given(st.integers(1, 500), st.integers(1, 4))
def test_modes(extent, sites) -> None:
    ways = list(factorisations(extent, sites))
    assert all(prod(way) == extent for way in ways)
    assert len(set(ways)) == len(ways)
    found = balanced_modes(extent, sites)
    if found is None:
        assert not any(min(way) > 1 for way in ways)
        assert sites > 1
    else:
        assert found in ways
        assert sites == 1 or min(found) > 1


def test_modes_nest_with_how_the_axis_is_cut() -> None:
    assert balanced_modes(384, 2) == (16, 24)
    assert balanced_modes(384, 2, (12, 32)) == (24, 16)
    assert fits_structure((24, 16), (12, 32))
    assert not fits_structure((16, 24), (12, 32))
    assert balanced_modes(7, 2) is None
    assert modes_of("tensor-train", 64, 13) is None
    assert modes_of("kronecker", 64, 13) is None
    assert modes_of("kronecker", 64, 48, skew=4) == ((16, 4), (4, 12))


@pytest.mark.parametrize("kind", ["tensor-train", "kronecker"])
def test_plans_are_smaller_and_lose_less_the_larger_they_are(kind) -> None:
    matrix, moment = normal(0, 48, 36), moment_of(0, 36, 60)
    for given_moment in (None, moment):
        plans = network_plans(matrix, given_moment, kinds=(kind,))
        assert plans
        assert all(plan.parameters < matrix.numel() for plan in plans)
        # The gain of fitting is interpolated, which need not fall everywhere.
        assert plans[-1].error < 0.6 * plans[0].error
        plan = plans[len(plans) // 2]
        cores = network_cores(plan, matrix, given_moment)
        assert sum(core.numel() for core in cores) == plan.parameters
        error = network_error(cores, matrix, given_moment)
        exact = given_moment is None
        assert plan.error == pytest.approx(error, rel=1e-6 if exact else 0.3)


@settings(max_examples=30)
@given(st.tuples(mode, mode), st.tuples(mode, mode), st.floats(0, 1))
def test_a_bond_never_takes_more_than_its_share(outs, ins, share) -> None:
    whole = prod(outs) * prod(ins)
    bond = bond_within(outs, ins, share * whole)
    full = full_bonds(outs, ins)
    assert 0 <= bond <= max(full)
    if bond:
        assert train_parameters(outs, ins, [min(bond, f) for f in full]) <= share * whole + 1e-9
    plan = network_plan("tensor-train", outs, ins, bond)
    assert plan is None or plan.parameters < whole


def test_bad_arguments() -> None:
    matrix = normal(0, 6, 8)
    with pytest.raises(ValueError, match="modes"):
        tensor_train(matrix, (2, 2), (2, 4))
    with pytest.raises(ValueError, match="bonds"):
        tensor_train(matrix, (2, 3), (2, 4), bond=0)
    assert network_plan("tensor-train", (2, 3), (2, 4), 0) is None


def test_a_matrix_of_zeros_and_dtypes() -> None:
    train: Train = tensor_train(torch.zeros(6, 8), (2, 3), (2, 4), bond=2)
    assert train.error == 0
    assert train.matrix.dtype == torch.float32
    assert float(train.matrix.abs().sum()) == 0
    assert network_error(train.cores, torch.zeros(6, 8), None) == 0
