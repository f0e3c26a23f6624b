"""Budgets of the whole model: what is predicted, how near the result comes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchlathe as tl
from tests.passes.erase_models import BIG, SMALL, program
from torchlathe.ir import OptionError, PassError, Program
from torchlathe.passes import PassManager, StructuredErase, ZeroInvariantGroups, parse_pipeline
from torchlathe.passes.rewrite.allocation.sizes import Sizes
from torchlathe.passes.rewrite.erasing.shrink import erase_units
from torchlathe.passes.rewrite.erasing.units import unit_indices

BUDGETS = ["params", "bytes", "flops"]


def erase(name: str, verify: Any = "off", **options: Any) -> Program:
    return PassManager([StructuredErase(**options)], verify=verify).run(program(name))


def cost(of: Program, budget: str) -> int:
    found = of.cost()
    return {"params": found.parameters, "bytes": found.bytes, "flops": found.flops_at()}[budget]


def messages(of: Program) -> str:
    return "\n".join(d["message"] for d in of.history[-1].diagnostics)


def largest_step(before: Program, after: Program, budget: str, round_to: int = 1) -> int:
    """What giving one more unit (or ``round_to`` of them) to the dearest family would cost."""
    families = before.analysis(ZeroInvariantGroups)
    chosen = tuple(f for f in families.prunable if f.exactness != "approximate")
    sizes = Sizes(before, families, chosen)
    measure = {"params": sizes.parameters, "bytes": sizes.bytes, "flops": sizes.flops}[budget]
    kept = {}
    for f in chosen:
        part = next(s for s in f.slices if s.writes)
        left = after.kept.get(part.name, {}).get(part.axis)
        term = families.axis_map.terms(before.tensor_nodes[part.name])[part.axis]
        if left is None:
            kept[f.atom.number] = f.extent
        else:
            owner = unit_indices(term, f.atom.number)[left]
            kept[f.atom.number] = len(owner[owner >= 0].unique())
    now = measure(kept)
    steps = []
    for f in chosen:
        more = dict(kept)
        more[f.atom.number] = min(f.extent, kept[f.atom.number] + round_to)
        steps.append(measure(more) - now)
    return max(steps)


@pytest.mark.parametrize("name", [*SMALL, *BIG])
@settings(max_examples=2)
@given(seed=st.integers(0, 999))
def test_sizes_are_those_of_the_erased_program(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    after = program(name).copy()
    families = after.analysis(ZeroInvariantGroups)
    chosen = tuple(f for f in families.prunable if f.exactness != "approximate")
    sizes = Sizes(after, families, chosen)
    units, kept = {}, {}
    for family in chosen:
        count = int(torch.randint(0, family.extent, (), generator=generator))
        units[family] = torch.randperm(family.extent, generator=generator)[:count]
        kept[family.atom.number] = family.extent - count
    predicted = {
        "params": sizes.parameters(kept),
        "bytes": sizes.bytes(kept),
        "flops": sizes.flops(kept),
    }
    # What a single unit saves, which is asked without looking at the rest of the program.
    for family in chosen:
        if family.extent > 1 and not family.folds:
            less = {family.atom.number: family.extent - 1}
            assert sizes.saved(family) == {
                "params": sizes.parameters({}) - sizes.parameters(less),
                "bytes": sizes.bytes({}) - sizes.bytes(less),
                "flops": sizes.flops({}) - sizes.flops(less),
            }
    erase_units(after, units)
    assert predicted == {budget: cost(after, budget) for budget in BUDGETS}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("budget", BUDGETS)
@settings(max_examples=10)
@given(
    share=st.floats(0.35, 1),
    scope=st.sampled_from(["global", "local", "isomorphic"]),
    round_to=st.sampled_from([1, 2, 4]),
)
def test_a_budget_holds_to_within_a_unit(
    name: str, budget: str, share: float, scope: str, round_to: int
) -> None:
    before = program(name)
    after = erase(name, scope=scope, round_to=round_to, **{budget: share})
    asked, got = share * cost(before, budget), cost(after, budget)
    warned = "is what was reached" in messages(after)
    assert warned == (got > asked)
    if not warned and got < cost(before, budget):
        assert asked - got <= largest_step(before, after, budget, round_to)


@pytest.mark.parametrize("name", BIG)
@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
def test_real_models_under_two_budgets(name: str, scope: str) -> None:
    before = program(name)
    after = erase(name, "fast", flops=0.6, params=0.7, scope=scope)
    record = after.history[-1]
    assert record.verification["passed"]
    assert "is what was reached" not in messages(after)
    for budget, share in (("flops", 0.6), ("params", 0.7)):
        assert cost(after, budget) <= share * cost(before, budget)
        assert record.statistics[f"{budget}_reached"] == cost(after, budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_absolute_amounts(budget: str) -> None:
    before = cost(program("attention"), budget)
    one = erase("attention", **{budget: 0.5})
    two = erase("attention", **{budget: before / 2})
    assert {n: t.shape for n, t in one.parameters.items()} == {
        n: t.shape for n, t in two.parameters.items()
    }
    assert cost(one, budget) <= before / 2


@settings(max_examples=8)
@given(low=st.floats(0.3, 1), high=st.floats(0.3, 1))
def test_a_smaller_budget_keeps_no_more(low: float, high: float) -> None:
    low, high = sorted((low, high))
    small, large = (erase("attention", flops=share) for share in (low, high))
    assert cost(small, "flops") <= cost(large, "flops")
    for name, tensor in small.parameters.items():
        # With the same scores the larger model has all that the smaller one has.
        for axis, indices in small.kept.get(name, {}).items():
            wide = large.kept.get(name, {}).get(axis)
            assert wide is None or set(indices.tolist()) <= set(wide.tolist())
        assert tensor.numel() <= large.parameters[name].numel()


def test_what_is_small_enough_stays_as_it_is() -> None:
    after = erase("gates", params="1M")
    assert not after.history[-1].changed
    assert "nothing to erase" in messages(after)


def test_how_far_it_got_and_what_stopped_it() -> None:
    after = erase("attention", params=0.05, keep_at_least=0.5)
    text = messages(after)
    assert "asked for params of at most" in text
    assert "families are at their floor (keep_at_least=0.5, round_to=1)" in text
    assert "the families that may be erased own" in text


def test_cost_aware_keeps_more_units() -> None:
    plain, aware = (erase("resnet18", flops=0.5, cost_aware=on) for on in (False, True))
    erased = [p.history[-1].statistics["erased_units"] for p in (plain, aware)]
    assert erased[1] < erased[0]
    assert cost(aware, "flops") <= 0.5 * cost(program("resnet18"), "flops")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"params": 0.5, "sparsity": 0.5}, "params and sparsity both say how much"),
        ({"flops": 0}, "flops is 0.0, but must be above 0"),
        ({"bytes": "5ms"}, "bytes is 5ms, but the units are"),
        ({"latency": 5.0}, "latency is 5.0, which is neither a share"),
        ({"params": "many"}, "params is many, which is not a number"),
        ({"zeros": True, "params": 0.5}, "params does not go with zeros"),
        ({"zeros": True, "sparsity": 0.5}, "sparsity does not go with zeros"),
        ({"zeros": True, "steps": 2}, "steps does not go with zeros"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"cost_aware": True, "scope": "local"}, "cost_aware ranks units"),
        ({"between": print}, "between is called between steps"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        StructuredErase(**options)


@pytest.mark.parametrize("options", [{"flops": 0.5}, {"params": 0.5, "scope": "local"}], ids=str)
def test_a_program_without_values(options: dict[str, Any]) -> None:
    with FakeTensorMode():
        model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(2, 8)
    fake = tl.capture(model.eval(), (x,))
    after = PassManager([StructuredErase(importance="random", **options)]).run(fake)
    (budget, share), *_ = options.items()
    assert 0.4 < cost(after, budget) / cost(fake, budget) <= share


def test_an_amount_below_one() -> None:
    with pytest.raises(PassError, match="params leaves nothing of"):
        erase("attention", params=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "structured-erase{flops=0.5,scope=isomorphic}",
        "structured-erase{params=20M,bytes=40MB,latency=5ms,steps=3,ramp=linear}",
        "structured-erase{sparsity={qkv.weight:0/1:0.5,up.*:0.25}}",
        "structured-erase{params=50%,cost-aware=true}",
    ],
)
def test_text_reads_back(text: str) -> None:
    (made,) = parse_pipeline(text)
    assert parse_pipeline(made.spec()) == [made]


def test_bad_values_in_text_name_the_option() -> None:
    with pytest.raises(OptionError, match="latency is 5 parsecs") as failure:
        parse_pipeline('structured-erase{flops=0.5,latency="5 parsecs"}')
    assert "0.7 for 70 % of the measured time, or 5ms" in str(failure.value)
    with pytest.raises(OptionError, match="expected global, local or isomorphic, got isomorph"):
        parse_pipeline("structured-erase{scope=isomorph}")
