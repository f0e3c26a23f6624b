"""How far down a ladder: limits hold, and no unit goes that could stay."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.passes.erase_models import program
from torchlathe.passes import ZeroInvariantGroups
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.rewrite.allocation.climbing import Limit, climb, closest, first_rung
from torchlathe.passes.rewrite.allocation.ladders import Floors, Ladder, global_ladder, local_ladder


@functools.cache
def families() -> tuple[Family, ...]:
    return program("gates").analysis(ZeroInvariantGroups).prunable


def ladder(scope: str, seed: int, floors: Floors) -> Ladder:
    generator = torch.Generator().manual_seed(seed)
    scores = {f: torch.rand(f.extent, generator=generator).double() for f in families()}
    return local_ladder(scores, floors) if scope == "local" else global_ladder(scores, floors)


def weights(seed: int) -> dict[int, float]:
    """What a unit of each family costs."""
    generator = torch.Generator().manual_seed(seed)
    return {f.atom.number: 0.1 + float(torch.rand((), generator=generator)) for f in families()}


def linear(cost: Mapping[int, float]) -> Limit:
    whole = {f.atom.number: f.extent for f in families()}
    return Limit("cost", 0.0, lambda kept: sum(cost[n] * kept.get(n, whole[n]) for n in cost))


def limit(cost: Mapping[int, float], share: float) -> Limit:
    measure = linear(cost).measure
    return Limit("cost", share * measure({}), measure)


@given(first=st.integers(0, 40), low=st.integers(0, 10), more=st.integers(0, 40))
def test_the_first_rung(first: int, low: int, more: int) -> None:
    high = low + more
    assert first_rung(lambda rung: rung >= first, low, high) == min(max(first, low), high)


@pytest.mark.parametrize("scope", ["global", "local"])
@settings(max_examples=30)
@given(
    seed=st.integers(0, 999),
    shares=st.lists(st.floats(0.2, 1), min_size=1, max_size=3),
    round_to=st.sampled_from([1, 2, 4]),
)
def test_all_limits_hold_and_no_unit_could_come_back(
    scope: str, seed: int, shares: list[float], round_to: int
) -> None:
    floors = Floors(1, round_to)
    limits = [limit(weights(seed + i), share) for i, share in enumerate(shares)]
    made = ladder(scope, seed, floors)
    found = climb(made, limits, floors)
    missed = [item for item in limits if not item.holds(found.by_atom)]
    assert list(found.unmet) == missed
    for family, count in found.kept.items():
        assert floors.of(family) <= count <= family.extent
        assert count % round_to == 0 or count == family.extent
    if missed or found.rung == 0:
        return
    # Everything that the last rung took would break a limit if it came back.
    above = dict(zip(made.families, made.kept(found.rung - 1), strict=True))
    for family, count in found.kept.items():
        if above[family] > count:
            more = found.by_atom | {
                family.atom.number: min(above[family], floors.rounded(count + 1, family))
            }
            assert not all(item.holds(more) for item in limits)


@pytest.mark.parametrize("scope", ["global", "local"])
@settings(max_examples=30)
@given(seed=st.integers(0, 999), share=st.floats(0.2, 1))
def test_the_closest_rung_is_the_closest(scope: str, seed: int, share: float) -> None:
    made = ladder(scope, seed, Floors())
    wanted = limit(weights(seed), share)
    found = closest(made, wanted)
    off = [
        abs(wanted.measure(made.by_atom(made.kept(rung))) - wanted.most)
        for rung in range(made.rungs + 1)
    ]
    assert abs(wanted.measure(found.by_atom) - wanted.most) == pytest.approx(min(off))


@settings(max_examples=20)
@given(seed=st.integers(0, 999), low=st.floats(0.1, 1), high=st.floats(0.1, 1))
def test_a_tighter_limit_is_further_down(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    floors = Floors()
    made = ladder("global", seed, floors)
    cost = weights(seed)
    tight, loose = (climb(made, [limit(cost, share)], floors) for share in (low, high))
    assert tight.rung >= loose.rung
    assert all(tight.kept[f] <= loose.kept[f] for f in families())


def test_no_families() -> None:
    empty = global_ladder({}, Floors())
    assert climb(empty, [Limit("cost", 1.0, lambda kept: 2.0)], Floors()).unmet
    assert closest(empty, Limit("cost", 1.0, lambda kept: 2.0)).kept == {}
