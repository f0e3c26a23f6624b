"""Parallel sums, shared bases and partitions: identities, and brute force."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlathe.passes.analysis.sharing.bases import (
    BasisLayer,
    dense_rank,
    fit_basis,
    shared_costs,
)
from torchlathe.passes.analysis.sharing.budgets import color_by_budget, color_by_count
from torchlathe.passes.analysis.sharing.coloring import by_theta
from torchlathe.passes.analysis.sharing.costs import (
    BaseCosts,
    BasisCosts,
    Limits,
    TiedCosts,
    WeighedLayer,
    corrected,
    leakage,
)
from torchlathe.passes.analysis.sharing.curvature import (
    Curvature,
    DiagonalCurvature,
    InputCurvature,
    KroneckerCurvature,
    merge_cost,
    merged_cost,
    merged_mean,
)
from torchlathe.passes.analysis.sharing.partitions import (
    agglomerate,
    all_partitions,
    best_partition,
    best_partitions,
    color_conflicts,
    partition_cost,
    refine,
)

OUTS, FEATURES = 3, 4
FORMS = ("diagonal", "inputs", "kronecker")
seeds = st.integers(0, 2**16)
# Sums of a hundred products in float64, damped by 1e-10 of the mean diagonal.
TOLERANCE: dict[str, Any] = {"rel": 1e-6, "abs": 1e-9}


def positive(size: int, generator: torch.Generator) -> torch.Tensor:
    root = torch.randn(size + 2, size, generator=generator, dtype=torch.float64)
    return root.T @ root / size


def curvature(form: str, generator: torch.Generator) -> Curvature:
    if form == "diagonal":
        return DiagonalCurvature(
            torch.rand(OUTS, FEATURES, generator=generator, dtype=torch.float64) + 0.1
        )
    if form == "inputs":
        return InputCurvature(positive(FEATURES, generator))
    return KroneckerCurvature(((positive(OUTS, generator), positive(FEATURES, generator)),))


def full(form: Curvature) -> torch.Tensor:
    """The form as a matrix over the flattened weight."""
    if isinstance(form, DiagonalCurvature):
        return form.values.flatten().diag()
    if isinstance(form, InputCurvature):
        return torch.kron(torch.eye(OUTS, dtype=torch.float64), form.inputs)
    assert isinstance(form, KroneckerCurvature)
    return sum((torch.kron(g, a) for g, a in form.terms), torch.zeros(12, 12, dtype=torch.float64))


def layers(form: str, count: int, seed: int) -> list[WeighedLayer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        WeighedLayer(
            torch.randn(OUTS, FEATURES, generator=generator, dtype=torch.float64),
            curvature(form, generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@settings(max_examples=15)
def test_a_merge_costs_the_parallel_sum(form: str, seed: int) -> None:
    a, b = layers(form, 2, seed)
    ha, hb = full(a.curvature), full(b.curvature)
    d = (a.weight - b.weight).flatten()
    parallel = ha @ torch.linalg.solve(ha + hb, hb)
    expected = 0.5 * float(d @ parallel @ d)
    assert merge_cost(a.curvature, a.weight, b.curvature, b.weight) == pytest.approx(
        expected, **TOLERANCE
    )
    both = merged_cost([a.curvature, b.curvature], [a.weight, b.weight])
    assert both == pytest.approx(expected, **TOLERANCE)
    # Symmetric, and never above what either form says of the difference.
    assert torch.allclose(parallel, parallel.T)
    for one in (a, b):
        assert expected <= 0.5 * one.curvature.quadratic(a.weight - b.weight) + 1e-9
    assert merge_cost(a.curvature, a.weight, b.curvature, a.weight) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@settings(max_examples=10)
def test_ward_increments_add_up_in_any_order(form: str, seed: int) -> None:
    members = layers(form, 4, seed)
    forms, weights = [m.curvature for m in members], [m.weight for m in members]
    direct = merged_cost(forms, weights)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        total, done = 0.0, [order[0]]
        form_so_far = forms[order[0]]
        for i in order[1:]:
            mean = merged_mean([forms[j] for j in done], [weights[j] for j in done])
            total += merge_cost(form_so_far, mean, forms[i], weights[i])
            form_so_far = form_so_far.plus(forms[i])
            done.append(i)
        assert total == pytest.approx(direct, **TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
@given(seed=seeds)
@settings(max_examples=10)
def test_the_merged_mean_is_the_best_and_equal_curvature_gives_the_plain_one(
    form: str, seed: int
) -> None:
    members = layers(form, 3, seed)
    weights = [m.weight for m in members]
    forms = [m.curvature for m in members]
    mean = merged_mean(forms, weights)
    best = merged_cost(forms, weights)
    plain = torch.stack(weights).mean(0)
    assert (
        best
        <= 0.5 * sum(f.quadratic(plain - w) for f, w in zip(forms, weights, strict=True)) + 1e-9
    )
    nudged = mean + 1e-3
    assert (
        best
        <= 0.5 * sum(f.quadratic(nudged - w) for f, w in zip(forms, weights, strict=True)) + 1e-9
    )
    torch.testing.assert_close(merged_mean([forms[0]] * 3, weights), plain)


def test_directions_that_no_layer_uses_get_the_plain_mean() -> None:
    dead = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    weights = [torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 6.0]]).double()]
    mean = merged_mean([InputCurvature(dead)] * 2, weights)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 4.0]]).double())


# --- partitions -----------------------------------------------------------------------------------


def table(count: int, seed: int):
    """A random cost for each class, zero for single layers."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(1 << count, generator=generator, dtype=torch.float64)

    def cost(members: frozenset[int]) -> float:
        mask = sum(1 << i for i in members)
        return 0.0 if len(members) == 1 else float(costs[mask]) * len(members)

    return cost


@given(st.integers(1, 6), seeds)
@settings(max_examples=20)
def test_the_exact_solver_agrees_with_brute_force(count: int, seed: int) -> None:
    cost = table(count, seed)
    found = best_partitions(count, cost)
    for number in range(1, count + 1):
        best = min(partition_cost(p, cost) for p in all_partitions(count) if len(p) == number)
        assert partition_cost(found[number], cost) == pytest.approx(best)
        assert sorted(i for members in found[number] for i in members) == list(range(count))

    def shifted(members: frozenset[int]) -> float:
        return cost(members) + 0.3

    best = min(partition_cost(p, shifted) for p in all_partitions(count))
    assert partition_cost(best_partition(count, shifted), shifted) == pytest.approx(best)


@pytest.mark.parametrize("form", FORMS)
def test_the_coloring_of_seven_layers_agrees_with_brute_force(form: str) -> None:
    costs = TiedCosts(layers(form, 7, seed=3))

    def cost(members: frozenset[int]) -> float:
        return float(costs.offers(members).costs[0])

    for classes in (1, 2, 3, 5):
        found = color_by_count(costs, classes)
        best = min(partition_cost(p, cost) for p in all_partitions(7) if len(p) == classes)
        assert partition_cost(found, cost) == pytest.approx(best, rel=1e-9)
        heuristic = color_by_count(costs, classes, "ward")
        # Not exact, but it starts with the cheapest merges and is refined.
        assert partition_cost(heuristic, cost) <= 1.25 * best + 1e-12
        assert len(heuristic) == classes


def test_there_are_bell_many_partitions() -> None:
    assert [sum(1 for _ in all_partitions(n)) for n in range(7)] == [1, 1, 2, 5, 15, 52, 203]


@given(seeds)
@settings(max_examples=15)
def test_refining_never_costs_more_and_keeps_the_classes(seed: int) -> None:
    cost = table(6, seed)
    for number, start in agglomerate(6, cost).items():
        found = refine(start, cost)
        assert partition_cost(found, cost) <= partition_cost(start, cost) + 1e-12
        assert len(found) == number
        free = refine(start, cost, keep_count=False)
        assert partition_cost(free, cost) <= partition_cost(start, cost) + 1e-12


@given(seeds)
@settings(max_examples=15)
def test_classes_never_increase_with_theta_and_conflicts_are_kept_apart(seed: int) -> None:
    costs = TiedCosts(layers("inputs", 6, seed))
    pairs = costs.pair_costs()
    counts: dict[str, list[int]] = {"exact": [], "dsatur": []}
    limits = [0.0, *sorted(pairs.values()), math.inf]
    for limit in limits:
        for name, found in (
            ("exact", by_theta(costs, limit)),
            ("dsatur", color_conflicts(pairs, 6, limit)),
        ):
            counts[name].append(len(found))
            for members in found:
                inside = sorted(members)
                assert all(pairs[i, j] <= limit for n, j in enumerate(inside) for i in inside[:n])
    for name, numbers in counts.items():
        assert numbers == sorted(numbers, reverse=True), name
        assert numbers[0] == 6
        assert numbers[-1] == 1
    assert all(e <= d for e, d in zip(counts["exact"], counts["dsatur"], strict=True))


@given(seeds, st.floats(0.4, 0.95))
@settings(max_examples=10)
def test_a_budget_over_types_is_met_at_the_least_cost(seed: int, share: float) -> None:
    types = [TiedCosts(layers("inputs", count, seed + count)) for count in (4, 3)]
    budget = share * 7 * OUTS * FEATURES
    solution = color_by_budget(types, budget)
    assert solution is not None
    assert solution.parameters <= budget
    assert solution.gap == 0
    best = math.inf
    for one in all_partitions(4):
        for other in all_partitions(3):
            if (len(one) + len(other)) * OUTS * FEATURES <= budget:
                cost = sum(float(types[0].offers(c).costs[0]) for c in one)
                best = min(best, cost + sum(float(types[1].offers(c).costs[0]) for c in other))
    assert solution.cost == pytest.approx(best, **TOLERANCE)


def test_a_budget_that_nothing_meets_gives_none() -> None:
    assert color_by_budget([TiedCosts(layers("inputs", 3, 0))], 5) is None


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_leakage_is_the_share_in_sharp_directions(form: str) -> None:
    (layer,) = layers(form, 1, 5)
    values, vectors = torch.linalg.eigh(full(layer.curvature))
    falling = values.flip(0)
    sharp = int(((falling.cumsum(0) - falling) < 0.5 * falling.sum()).sum())
    basis = vectors.flip(1)[:, :sharp]
    change = layer.weight.flatten()
    expected = float((basis.T @ change).square().sum() / change.square().sum())
    # Equal eigenvalues (one per row for `inputs`) leave the choice of directions open.
    if form != "inputs":
        assert leakage(layer.curvature, layer.weight) == pytest.approx(expected)
    assert 0 <= leakage(layer.curvature, layer.weight) <= 1


def test_limits_forbid_classes() -> None:
    members = layers("inputs", 4, 7)
    free = color_by_count(TiedCosts(members), 1)
    assert len(free) == 1
    strict = TiedCosts(members, Limits(trust=1e-6))
    assert len(color_by_count(strict, 1)) == 4
    assert len(color_by_count(TiedCosts(members, Limits(leakage=0.0)), 1)) == 4


# --- bases ----------------------------------------------------------------------------------------


def basis_layers(count: int, seed: int, *, gradients: bool = True) -> list[BasisLayer]:
    generator = torch.Generator().manual_seed(seed)
    return [
        BasisLayer(
            torch.randn(6, 8, generator=generator, dtype=torch.float64),
            positive(8, generator),
            positive(6, generator) if gradients else None,
        )
        for _ in range(count)
    ]


@given(seeds, st.integers(1, 3), st.booleans())
@settings(max_examples=15)
def test_the_curve_of_costs_is_what_fitting_gives(seed: int, count: int, gradients: bool) -> None:
    members = basis_layers(count, seed, gradients=gradients)
    costs = shared_costs(members)
    assert len(costs) == dense_rank(members) + 1
    assert float(costs[0]) == pytest.approx(sum(m.energy for m in members))
    assert bool((costs[1:] <= costs[:-1] + 1e-12).all())
    for rank in (1, 3):
        start = fit_basis(members, rank, rounds=0)
        assert start.cost == pytest.approx(float(costs[rank]), **TOLERANCE)
        fitted = fit_basis(members, rank, rounds=5)
        assert fitted.cost <= start.cost + 1e-9
        assert list(fitted.steps) == sorted(fitted.steps, reverse=True)


def test_one_layer_gets_the_whitened_svd() -> None:
    (layer,) = basis_layers(1, 0, gradients=False)
    fit = fit_basis([layer], 3)
    root = torch.linalg.cholesky(layer.inputs)
    dropped = torch.linalg.svdvals(layer.weight @ root)[3:]
    assert fit.cost == pytest.approx(0.5 * float(dropped.square().sum()), **TOLERANCE)


def test_layers_in_one_space_share_a_basis_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    members = [
        BasisLayer(
            torch.randn(6, 2, generator=generator, dtype=torch.float64) @ basis,
            positive(8, generator),
        )
        for _ in range(3)
    ]
    assert fit_basis(members, 2).cost == pytest.approx(0, abs=1e-9)
    costs = BasisCosts([WeighedLayer(m.weight, InputCurvature(m.inputs), m) for m in members])
    solution = color_by_budget([costs], 2 * (8 + 18))
    assert solution is not None
    assert [sorted(c) for c in solution.types[0].classes] == [[0, 1, 2]]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_coloring_of_bases_is_no_worse_than_any_fixed_partition(share: float) -> None:
    members = basis_layers(4, 11)
    weighed = [
        WeighedLayer(m.weight, KroneckerCurvature(((m.outputs, m.inputs),)), m)  # type: ignore
        for m in members
    ]
    costs = BasisCosts(weighed)
    budget = share * 4 * 48
    best = color_by_budget([costs], budget)
    assert best is not None
    assert best.parameters <= budget
    assert best.bound is not None
    assert best.bound <= best.cost + 1e-9
    for partition in all_partitions(4):
        fixed = color_by_budget([costs], budget, fixed=[partition])
        if fixed is not None:
            # The relaxation's bound holds for every partition.
            assert best.bound <= fixed.cost + 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_corrections_of_full_rank_take_all_of_the_cost(form: str) -> None:
    members = layers(form, 3, 2)
    nothing = TiedCosts(members).offers(frozenset(range(3))).costs[0]
    some = BaseCosts(members, 1).offers(frozenset(range(3))).costs[0]
    assert float(some) < float(nothing)
    common, factors = corrected(members, 3)
    for layer, (left, right) in zip(members, factors, strict=True):
        torch.testing.assert_close(common + left @ right, layer.weight, rtol=1e-5, atol=1e-6)
