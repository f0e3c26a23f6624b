"""Ladders: monotone, above the floors, round numbers, and fair to groups of the same structure."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.analysis.families import Families, Family
from torchlathe.passes.rewrite.allocation.isomorphism import isomorphic_groups, structure_of
from torchlathe.passes.rewrite.allocation.ladders import (
    Floors,
    Ladder,
    global_ladder,
    isomorphic_ladder,
    kept_by_share,
    local_ladder,
    lowest,
)

SCOPES = ["global", "local", "isomorphic"]


class Blocks(nn.Module):
    """Three residual MLPs of other widths, and a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(6, n) for n in (5, 12, 20))
        self.down = nn.ModuleList(nn.Linear(n, 6) for n in (5, 12, 20))
        self.gate, self.value, self.out = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x + self.out(torch.relu(self.gate(x)) * self.value(x))


@functools.cache
def families() -> Families:
    torch.manual_seed(0)
    return tl.capture(Blocks().eval(), (torch.randn(2, 6),)).analysis(ZeroInvariantGroups)


def ladder(scope: str, scores: dict[Family, Tensor], floors: Floors) -> Ladder:
    if scope == "local":
        return local_ladder(scores, floors)
    if scope == "global":
        return global_ladder(scores, floors)
    return isomorphic_ladder(scores, isomorphic_groups(scores, families()), floors)


def draw(seed: int, *, infinite: bool = False) -> dict[Family, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f: torch.rand(f.extent, generator=generator, dtype=torch.float64)
        for f in families().prunable
    }
    if infinite:
        for score in scores.values():
            score[torch.rand(len(score), generator=generator) < 0.3] = float("inf")
    return scores


floors = st.builds(
    Floors,
    keep_at_least=st.sampled_from([1, 3, 0.25, 0.5, 0.9]),
    round_to=st.sampled_from([1, 2, 3, 4, 8]),
)


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), floors=floors)
def test_a_ladder_goes_down_to_the_floors_in_round_numbers(
    scope: str, seed: int, floors: Floors
) -> None:
    scores = draw(seed)
    made = ladder(scope, scores, floors)
    assert made.kept(0) == [f.extent for f in made.families]
    assert made.kept(made.rungs) == [floors.of(f) for f in made.families]
    above = made.kept(0)
    for rung in range(1, made.rungs + 1):
        counts = made.kept(rung)
        for family, count, before in zip(made.families, counts, above, strict=True):
            assert floors.of(family) <= count <= before
            assert count % floors.round_to == 0 or count == family.extent
        above = counts


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), round_to=st.sampled_from([1, 4]))
def test_infinite_scores_always_stay(scope: str, seed: int, round_to: int) -> None:
    scores = draw(seed, infinite=True)
    made = ladder(scope, scores, Floors(1, round_to))
    for family, count in zip(made.families, made.kept(made.rungs), strict=True):
        assert not scores[family][lowest(scores[family], count)].isinf().any()


@settings(max_examples=25)
@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_a_global_rung_takes_the_lowest_of_all(seed: int, share: float) -> None:
    scores = draw(seed)
    made = global_ladder(scores, Floors(), normalise=False)
    counts = made.kept(round(share * made.rungs))
    gone = torch.cat([s[lowest(s, k)] for s, k in zip(scores.values(), counts, strict=True)])
    # The one that stays since it is the last of its family may be lower than all that went.
    left = [
        s.sort().values[len(s) - k] if k > 1 else torch.tensor(float("inf"))
        for s, k in zip(scores.values(), counts, strict=True)
    ]
    assert not len(gone) or float(gone.max()) <= min(map(float, left))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), share=st.floats(0, 0.8))
def test_each_group_loses_the_same_share(seed: int, share: float) -> None:
    scores = draw(seed)
    groups = isomorphic_groups(scores, families())
    made = isomorphic_ladder(scores, groups, Floors())
    rung = round(share * made.rungs)
    kept = dict(zip(made.families, made.kept(rung), strict=True))
    for group in groups:
        units = sum(f.extent for f in group)
        gone = units - sum(kept[f] for f in group)
        assert gone == min(round(units * rung / made.rungs), units - len(group))


def test_families_alike_are_one_group() -> None:
    grouped = [[f.name for f in g] for g in isomorphic_groups(families().prunable, families())]
    assert grouped == [
        ["up.0.weight:0", "up.1.weight:0", "up.2.weight:0"],
        ["gate.weight:0"],
    ]


def test_structure_does_not_depend_on_where_it_stands() -> None:
    model = nn.Sequential(
        *(layer for _ in range(3) for layer in (nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 4))),
        nn.Linear(4, 7),
        nn.Tanh(),
        nn.Linear(7, 4),
    )
    found = tl.capture(model.eval(), (torch.randn(2, 4),)).analysis(ZeroInvariantGroups)
    inner = [f for f in found.prunable if f.extent == 7]
    keys = [structure_of(f, found) for f in inner]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_costs_move_the_cheap_up() -> None:
    scores = {f: torch.ones(f.extent, dtype=torch.float64) for f in families().prunable}
    dear = families().prunable[2]
    costs = {f: 4.0 if f is dear else 1.0 for f in scores}
    made = global_ladder(scores, Floors(), costs=costs)
    kept = dict(zip(made.families, made.kept(dear.extent - 1), strict=True))
    # As important as all others, and saving four times as much: it goes first.
    assert {f: f.extent - k for f, k in kept.items() if k < f.extent} == {dear: dear.extent - 1}


def test_a_share_of_each_family() -> None:
    scores = draw(0)
    shares = dict.fromkeys(scores, 0.5)
    assert list(kept_by_share(scores, shares, Floors(1, 4)).values()) == [
        min(f.extent, -(-round(f.extent / 2) // 4) * 4) for f in scores
    ]
