"""Properties of families and of erasing, on random networks in float64.

HYPOTHESIS_PROFILE=explore draws new networks each time, and many more of them.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import fx

from tests.properties.random_nets import SOURCES, Plan, build, inputs, plans
from tests.zoo.oracle import (
    EXACT,
    F64_LIMIT,
    check_structure,
    erased,
    erased_elements,
    in_float64,
    outputs,
    relative_error,
    zeroed_twin,
)
from torchlathe.ir import Program, capture
from torchlathe.passes import ZeroInvariantGroups

BATCHES = (2, 3)


def bounded(examples: int) -> settings:
    """So many examples by default; as many as the profile says when exploring."""
    default = settings.default
    assert default is not None
    return settings(
        max_examples=examples if default.derandomize else default.max_examples,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        deadline=None,
    )


every_source = pytest.mark.parametrize("source", SOURCES)


def captured(plan: Plan, *, identities: bool = False) -> tuple[torch.nn.Module, Program]:
    model = build(plan, identities=identities)
    (args, kwargs), dynamic = inputs(plan, BATCHES[0])
    return model, capture(model, args, kwargs, dynamic_shapes=dynamic)


def drawn_units(data: st.DataObject, families: list[Any], keep: int = 1) -> dict[str, torch.Tensor]:
    """Random units of random families, by name; so many units of each family stay."""
    assume(families)
    names = data.draw(
        st.lists(st.sampled_from(families), min_size=1, max_size=4, unique_by=lambda f: f.name)
    )
    units = {}
    for family in names:
        if family.extent <= keep:
            continue
        indices = data.draw(
            st.sets(st.integers(0, family.extent - 1), min_size=1, max_size=family.extent - keep)
        )
        units[family.name] = torch.tensor(sorted(indices))
    assume(units)
    return units


def compare(plan: Plan, model: torch.nn.Module, program: Program, after: Program) -> float:
    """Worst error of an erased program against the zeroed module, over two batches."""
    twin = zeroed_twin(model, after.zeroed)
    worst = 0.0
    for batch in BATCHES:
        given_inputs, _ = inputs(plan, batch)
        want = outputs(twin, given_inputs)
        worst = max(worst, relative_error(outputs(in_float64(after.run), given_inputs), want))
    return worst


def check_exact(source: str, data: st.DataObject) -> None:
    """Erase some units of some exact families, and compare with the zeroed module."""
    plan = data.draw(plans(source))
    model, program = captured(plan)
    prunable = program.analysis(ZeroInvariantGroups).prunable
    exact = [f for f in prunable if f.exactness in EXACT]
    after, _ = erased(program, drawn_units(data, exact))
    check_structure(program, after)
    error = compare(plan, model, program, after)
    assert error <= F64_LIMIT, f"{error:.2e}"


@every_source
@bounded(5)
@given(data=st.data())
def test_erasing_equals_zeroing(source: str, data: st.DataObject) -> None:
    """Whatever is declared exact is: erased against zeroed, and the shapes are as kept says."""
    check_exact(source, data)


@pytest.mark.slow
@every_source
@bounded(100)
@given(data=st.data())
def test_erasing_equals_zeroing_often(source: str, data: st.DataObject) -> None:
    """The same with many more networks."""
    check_exact(source, data)


@every_source
@bounded(2)
@given(data=st.data())
def test_approximate_families_run(source: str, data: st.DataObject) -> None:
    """What is only approximate still gives a program that runs at other sizes."""
    plan = data.draw(plans(source))
    model, program = captured(plan)
    prunable = program.analysis(ZeroInvariantGroups).prunable
    after, _ = erased(program, drawn_units(data, list(prunable)))
    check_structure(program, after)
    assert compare(plan, model, program, after) < float("inf")


@every_source
@bounded(2)
@given(data=st.data())
def test_erasing_twice_is_erasing_the_union(source: str, data: st.DataObject) -> None:
    plan = data.draw(plans(source))
    _, program = captured(plan)
    families = program.analysis(ZeroInvariantGroups)
    # Of one unit no axis is left, and the places that families are named by move up.
    units = drawn_units(data, [f for f in families.prunable if f.exactness in EXACT], keep=2)
    first, second = {}, {}
    for name, indices in units.items():
        here = torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=len(indices), max_size=len(indices)))
        )
        if here.any():
            first[name] = indices[here]
        if not here.all():
            later = indices[~here]
            # Units that went first no longer count.
            second[name] = later - (later[:, None] > indices[here][None]).sum(1)
    together, _ = erased(program, units)
    apart = erased(program, first)[0] if first else program
    apart = erased(apart, second)[0] if second else apart

    assert together.entries.keys() == apart.entries.keys()
    for name, entry in together.entries.items():
        other = apart.entries[name].tensor
        assert entry.tensor.shape == other.shape, name
        torch.testing.assert_close(entry.tensor, other, rtol=1e-12, atol=1e-12)
    assert _as_sets(together.kept) == _as_sets(apart.kept)
    assert _as_sets(together.zeroed) == _as_sets(apart.zeroed)
    for batch in BATCHES:
        given_inputs, _ = inputs(plan, batch)
        want = outputs(together.run, given_inputs)
        assert relative_error(outputs(apart.run, given_inputs), want) <= F64_LIMIT


def _as_sets(indices: dict[str, dict[int, torch.Tensor]]) -> dict[tuple[str, int], list[int]]:
    return {(n, a): i.tolist() for n, axes in indices.items() for a, i in axes.items() if len(i)}


@every_source
@bounded(1)
@given(data=st.data())
def test_units_partition_their_axes(source: str, data: st.DataObject) -> None:
    """Units of one family own disjoint slices, as large as declared, on every axis."""
    plan = data.draw(plans(source, steps=5))
    _, program = captured(plan)
    prunable = program.analysis(ZeroInvariantGroups).prunable
    assume(prunable)
    family = data.draw(st.sampled_from(prunable))
    assume(family.extent >= 2)
    owned: dict[tuple[str, int], Counter[int]] = {}
    repeats = {(s.name, s.axis): s.repeat for s in family.slices}
    for unit in range(family.extent):
        after, _ = erased(program, {family.name: torch.tensor([unit])})
        gone = erased_elements(program, after)
        assert {key: len(g) for key, g in gone.items()} == repeats
        for key, elements in gone.items():
            owned.setdefault(key, Counter()).update(elements)
    for key, count in owned.items():
        assert set(count.values()) == {1}, f"{key} has indices in two units"
        assert len(count) == repeats[key] * family.extent


def _relation(program: Program) -> set[Any]:
    return {
        (
            frozenset((s.name, s.axis, s.repeat, s.writes) for s in family.slices),
            family.extent,
            family.prunable,
            family.exactness,
        )
        for family in program.analysis(ZeroInvariantGroups)
    }


@every_source
@bounded(1)
@given(data=st.data())
def test_identities_change_nothing(source: str, data: st.DataObject) -> None:
    """The relation is the same with ops in between that change nothing."""
    plan = data.draw(plans(source))
    _, plain = captured(plan)
    _, padded = captured(plan, identities=True)
    assert _relation(plain) == _relation(padded)


@every_source
@bounded(1)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_order_and_names_change_nothing(source: str, data: st.DataObject, seed: int) -> None:
    """The relation is the same with nodes renamed and in another topological order."""
    plan = data.draw(plans(source))
    _, program = captured(plan)
    shuffled = program.copy()
    _shuffle(shuffled.graph, random.Random(seed))
    shuffled.graph.lint()
    assert _relation(program) == _relation(shuffled)


def _shuffle(graph: fx.Graph, generator: random.Random) -> None:
    waiting = [n for n in graph.nodes if n.op == "call_function"]
    done = {n for n in graph.nodes if n.op == "placeholder"}
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    count = 0
    while waiting:
        ready = [n for n in waiting if all(used in done for used in n.all_input_nodes)]
        node = generator.choice(ready)
        waiting.remove(node)
        done.add(node)
        last.append(node)
        last = node
        node.name = f"renamed_{count}"
        count += 1
