"""Properties of splitting and reordering, on random networks in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties.random_nets import SOURCES, build, inputs, plans
from tests.properties.test_random_nets import bounded
from torchlathe import PassManager
from torchlathe.ir import Program, capture
from torchlathe.ir.verifying import verify

every_source = pytest.mark.parametrize("source", SOURCES)


def captured(data: st.DataObject, source: str) -> tuple[Program, Any]:
    plan = data.draw(plans(source))
    (args, kwargs), dynamic = inputs(plan, 2)
    model = build(plan).double().eval()
    program = capture(model, _double(args), _double(kwargs), dynamic_shapes=dynamic)
    (args, kwargs), _ = inputs(plan, 3, seed=1)
    return program, (_double(args), _double(kwargs))


def _double(values: Any) -> Any:
    def wide(x: Any) -> Any:
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(wide, values)


def flat(program: Program, given_inputs: Any) -> list[torch.Tensor]:
    args, kwargs = given_inputs
    found = torch.utils._pytree.tree_leaves(program.run(*args, **kwargs))
    return [x.detach() for x in found if isinstance(x, torch.Tensor)]


@every_source
@bounded(3)
@given(data=st.data())
def test_reordering_is_exact_and_never_dearer(source: str, data: st.DataObject) -> None:
    program, others = captured(data, source)
    after = PassManager("reorder-linear").run(program)
    verify(after, "full")
    for found, wanted in zip(flat(after, others), flat(program, others), strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * max(scale, 1.0))
    assert after.cost().flops_at() <= program.cost().flops_at()
    assert after.cost().parameters <= program.cost().parameters
    assert not PassManager("reorder-linear").run(after).history[-1].changed


@every_source
@bounded(2)
@given(data=st.data())
def test_a_split_is_never_larger_and_keeps_the_outputs_form(
    source: str, data: st.DataObject
) -> None:
    program, others = captured(data, source)
    method = data.draw(st.sampled_from(["svd", "whitened-svd"]))
    form = data.draw(st.sampled_from(["channel", "spatial", "tucker"]))
    joint = data.draw(st.booleans())
    share = data.draw(st.sampled_from([0.5, 0.9]))
    spec = (
        f"low-rank-split{{method={method},share={share},convolutions={form},"
        f"joint={str(joint).lower()},allocation=uniform,embeddings=true}}"
    )
    after = PassManager(spec).run(program)
    verify(after, "full")
    assert after.cost().parameters <= program.cost().parameters
    assert after.history[-1].changed == (after.cost().parameters < program.cost().parameters)
    for found, wanted in zip(flat(after, others), flat(program, others), strict=True):
        assert found.shape == wanted.shape
        assert found.isfinite().all()
