"""Each op of the random networks by itself between two layers, with every family that it has.

Where the networks of `test_random_nets` draw some ops and some families, this goes through all.
TORCHLATHE_TEST_SEED draws other variants.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import nn

from tests.properties.random_nets import Plan, Step, Value, build, inputs
from tests.properties.random_ops import KEEPING, fitting
from tests.zoo.oracle import (
    EXACT,
    F64_LIMIT,
    check_structure,
    erased,
    in_float64,
    outputs,
    relative_error,
    zeroed_twin,
)
from torchlathe.ir import Program, capture
from torchlathe.passes import ZeroInvariantGroups

WIDTH = 6
EDGE = 8
BEFORE = (None, None, "relu", "sigmoid", "cos")
# Ops with many ways of writing them.
MANY = {"grouped_queries": 24, "instance_norm_kinds": 4, "group_norm_kinds": 6, "padded_apart": 4}
# Of each kind, what has been wrong before or is most easily so.
SOME = {
    "image": ["group_norm_kinds", "train_batch_norm", "padded_apart"],
    "sequence": ["grouped_queries", "experts"],
    "vector": ["weight_standard", "by_std_mean"],
}


def plan_of(kind: str, name: str, count: int, generator: random.Random) -> Plan:
    """Layer, perhaps a function, the op, perhaps what came before it added, and a layer."""
    value = Value(kind, WIDTH, EDGE if kind == "image" else 0)
    steps = []
    before = generator.choice(BEFORE)
    if before == "cos":
        steps.append(Step("keeping", (0,), (value,), {"name": "cos", "hidden": 4, "seed": 0}))
    elif before is not None:
        steps.append(Step(before, (0,), (value,)))
    options = {"name": name, "hidden": 4, "seed": generator.randint(0, 383)}
    steps.append(Step("keeping", (len(steps),), (value,), options))
    if count % 2:
        steps.append(Step("add", (len(steps), 0), (value,)))
    layer = "conv" if kind == "image" else "linear"
    steps.append(Step(layer, (len(steps),), (value,), {"size": 3, "bias": True}))
    steps.append(Step("relu", (len(steps),), (value,)))
    return Plan(kind, WIDTH, tuple(steps))


def error_of(
    plan: Plan, model: nn.Module, program: Program, units: dict[str, torch.Tensor]
) -> float:
    after, _ = erased(program, units)
    check_structure(program, after)
    twin = zeroed_twin(model, after.zeroed)
    given, _ = inputs(plan, 3)
    return relative_error(outputs(in_float64(after.run), given), outputs(twin, given))


def check_all_families(plan: Plan, generator: random.Random) -> None:
    """Random units of each family alone, and of all exact ones together."""
    model = build(plan)
    (args, kwargs), dynamic = inputs(plan)
    program = capture(model, args, kwargs, dynamic_shapes=dynamic)
    together: dict[str, torch.Tensor] = {}
    for family in program.analysis(ZeroInvariantGroups).prunable:
        if family.extent < 2:
            continue
        count = generator.randint(1, family.extent - 1)
        units = {family.name: torch.tensor(sorted(generator.sample(range(family.extent), count)))}
        error = error_of(plan, model, program, units)  # what is approximate has to run
        if family.exactness in EXACT:
            assert error <= F64_LIMIT, f"{family}, units {units}: {error:.1e}, {plan}"
            together |= units
    if together:
        error = error_of(plan, model, program, together)
        assert error <= F64_LIMIT, f"units {together}: {error:.1e}, {plan}"


def _seed() -> int:
    return int(os.environ.get("TORCHLATHE_TEST_SEED", "0"))


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in SOME.items() for n in names])
def test_some_ops(kind: str, name: str) -> None:
    generator = random.Random(f"{kind} {name} {_seed()}")
    check_all_families(plan_of(kind, name, 1, generator), generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEEPING)
def test_every_op(kind: str) -> None:
    for name in fitting(kind, WIDTH, EDGE):
        generator = random.Random(f"{kind} {name} {_seed()}")
        for count in range(MANY.get(name, 3)):
            check_all_families(plan_of(kind, name, count, generator), generator)
