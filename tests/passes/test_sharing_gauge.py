"""Matching units of two layers, balancing scales, and aligning whole programs."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.passes.sharing_models import planted, planted_program, program_of
from torchlathe.ir import InputError, capture
from torchlathe.passes.analysis.gauge import (
    balanced_scales,
    match_units,
    merging_costs,
    unit_agreement,
)
from torchlathe.passes.analysis.sharing.alignment import align_layers
from torchlathe.passes.analysis.sharing.candidates import find_candidates

seeds = st.integers(0, 2**16)


@given(seeds, st.integers(2, 12), st.integers(1, 3))
def test_a_permuted_copy_is_found(seed: int, units: int, tensors: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = [torch.randn(units, 5, 2, generator=generator) for _ in range(tensors)]
    order = torch.randperm(units, generator=generator)
    other = [tensor[order] for tensor in reference]
    found = match_units(reference, other)
    for mine, theirs in zip(reference, other, strict=True):
        assert torch.equal(theirs[found], mine)


@given(seeds, st.integers(2, 5))
def test_no_permutation_agrees_more(seed: int, units: int) -> None:
    from itertools import permutations

    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, units, 3, generator=generator, dtype=torch.float64)
    gains = unit_agreement([a], [b])
    best = max(float(gains[range(units), list(p)].sum()) for p in permutations(range(units)))
    found = float((a * b[match_units([a], [b])]).sum())
    # The sums are of the same numbers in another order.
    assert found == pytest.approx(best, rel=1e-12, abs=1e-12)


@given(seeds, st.integers(2, 5), st.integers(1, 2))
def test_curvature_decides_which_units_meet(seed: int, units: int, tensors: int) -> None:
    """Against every permutation, where a curvature is that of a unit times that of a place."""
    from itertools import permutations

    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [[drawn(units, 3, 2) for _ in range(tensors)] for _ in range(2)]
    places = [drawn(3, 2).square() for _ in range(tensors)]
    curvatures = [[drawn(units, 1, 1).square() * p for p in places] for _ in range(2)]
    both = (curvatures[0], curvatures[1])

    def cost(order: list[int]) -> float:
        total = 0.0
        for w, v, h, k in zip(*weights, *curvatures, strict=True):
            parallel = h * k[order] / (h + k[order])
            total += float((parallel * (w - v[order]).square()).sum()) / 2
        return total

    pairs = merging_costs(weights[0], weights[1], both)
    found = match_units(weights[0], weights[1], both).tolist()
    # The squares are sums of three, of which two may cancel.
    assert float(pairs[range(units), found].sum()) == pytest.approx(cost(found), rel=1e-9, abs=1e-9)
    best = min(cost(list(order)) for order in permutations(range(units)))
    assert cost(found) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_units_without_curvature_cost_nothing() -> None:
    a, b = torch.randn(2, 3, 4)
    zeros = torch.zeros(3, 4)
    assert not merging_costs([a], [b], ([zeros], [zeros])).any()
    assert not merging_costs([a], [b], ([torch.ones(3, 4)], [zeros])).any()
    with pytest.raises(InputError, match="shapes"):
        merging_costs([a], [b], ([zeros], [torch.zeros(3, 5)]))


def test_noise_where_the_loss_does_not_look_misleads_plain_distances_alone() -> None:
    torch.manual_seed(0)
    a = torch.randn(6, 8)
    order = torch.randperm(6)
    b = a[order].clone()
    b[:, 4:] += 20 * torch.randn(6, 4)  # features that are hardly ever there
    curvature = torch.ones(6, 8)
    curvature[:, 4:] = 1e-6
    wanted = torch.argsort(order)
    assert torch.equal(match_units([a], [b], ([curvature], [curvature])), wanted)
    assert not torch.equal(match_units([a], [b]), wanted)


@given(seeds)
def test_balanced_units_have_equal_norms_and_compute_the_same(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    columns = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    scales = balanced_scales([rows], [columns.T])
    new_rows, new_columns = rows * scales[:, None], columns / scales
    torch.testing.assert_close(new_rows.norm(dim=1), new_columns.norm(dim=0))
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    before = torch.relu(x @ rows.T) @ columns.T
    torch.testing.assert_close(torch.relu(x @ new_rows.T) @ new_columns.T, before)


def test_units_without_weights_keep_their_scale() -> None:
    scales = balanced_scales([torch.tensor([[0.0], [4.0]])], [torch.tensor([[2.0], [1.0]])])
    assert scales.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        ([], [], "equally many tensors"),
        ([torch.ones(2, 3)], [], "got 1 and 0"),
        ([torch.ones(2, 3)], [torch.ones(3, 2)], "shapes"),
        ([torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)], "number of units"),
        ([torch.full((2, 2), torch.nan)], [torch.ones(2, 2)], "not finite"),
    ],
)
def test_what_cannot_be_matched_is_refused(reference, other, message: str) -> None:
    with pytest.raises(InputError, match=message):
        match_units(reference, other)


def test_scales_need_both_sides() -> None:
    with pytest.raises(InputError, match="writes"):
        balanced_scales([], [torch.ones(2, 2)])
    with pytest.raises(InputError, match="number of units"):
        balanced_scales([torch.ones(2, 2)], [torch.ones(3, 2)])


@pytest.mark.parametrize("scale", [False, True], ids=["permuted", "scaled"])
def test_aligned_copies_are_equal_and_the_program_computes_the_same(scale: bool) -> None:
    program, x = planted_program(scale=scale)
    names = [layer.name for layer in find_candidates(program)]
    gauge = align_layers(program, names)
    before = program.run(x, dtype=torch.float64)
    after = program.run(
        x, dtype=torch.float64, replace_tensor=lambda name, t: gauge.tensors.get(name, t)
    )
    # Permuting is exact; scaling rounds the weights in float32.
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    for part in ("up.weight", "down.weight", "up.bias"):
        first, third = (gauge.get(program, f"blocks.{i}.{part}") for i in (0, 3))
        torch.testing.assert_close(first, third, rtol=1e-5, atol=1e-6)


def test_scales_stay_where_the_activation_is_not_homogeneous() -> None:
    program, _ = program_of(planted(scale=True, act=nn.GELU()))
    gauge = align_layers(program, [layer.name for layer in find_candidates(program)])
    assert not gauge.scaled


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, 4, 2).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(b, n, 8))


def test_heads_are_aligned() -> None:
    model: Any = nn.Sequential(*(Attention() for _ in range(2))).eval()
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 2 + torch.arange(2)).flatten()
    with torch.no_grad():
        for part in ("q", "k", "v"):
            getattr(model[1], part).weight.copy_(getattr(model[0], part).weight[rows])
            getattr(model[1], part).bias.copy_(getattr(model[0], part).bias[rows])
        model[1].out.weight.copy_(model[0].out.weight[:, rows])
    x = torch.randn(2, 5, 8)
    program = capture(model, (x,))
    gauge = align_layers(program, [layer.name for layer in find_candidates(program)])
    assert gauge.permuted
    for part in ("q", "k", "v", "out"):
        first, second = (gauge.get(program, f"{i}.{part}.weight") for i in (0, 1))
        assert torch.equal(first, second)
    after = program.run(x, replace_tensor=lambda name, t: gauge.tensors.get(name, t))
    # Sums over the permuted heads come in another order.
    torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-6)
