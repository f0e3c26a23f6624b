"""Scales of hidden units: which are free is read off the graph, and balancing changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.passes.moe_models import EACH, TopK, made
from torchlathe.ir import OptionError, capture
from torchlathe.passes import ExpertLayers, MergeExperts, PassManager
from torchlathe.passes.rewrite.experts.alignment import expert_of, units_of


class Gated(TopK):
    """Gated experts, in forms that models have and in some that they do not."""

    def __init__(self, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.join = join

    def mixed(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        numbers = logits.argmax(-1)
        up = torch.bmm(self.up[numbers], x.unsqueeze(-1)).squeeze(-1) + self.up_bias[numbers]
        gate, value = up.chunk(2, dim=-1)
        return torch.bmm(self.down[numbers], self.join(gate, value).unsqueeze(-1)).squeeze(-1)


def scaled_slots(model: torch.nn.Module) -> set[tuple[str, int]]:
    program = capture(model, (torch.randn(6, 6),))
    (layer,) = program.analysis(ExpertLayers).layers
    (units,) = units_of(program, layer, balance=True).units
    assert units.readers == {"down"}
    assert not units_of(program, layer, balance=False).units[0].scaled
    return set(units.scaled)


VALUES = {("up", 1), ("up_bias", 1)}
GATES = {("up", 0), ("up_bias", 0)}


@pytest.mark.parametrize(
    ("join", "free"),
    [
        (lambda a, b: F.silu(a) * b, VALUES),
        (lambda a, b: a * F.sigmoid(b), GATES),
        (lambda a, b: F.relu(a) * F.gelu(b), GATES),
        (lambda a, b: F.silu(a) * (b + 1), set()),
        (lambda a, b: F.silu(a) * b * b, set()),
        (lambda a, b: F.silu(a * b), set()),
        (lambda a, b: F.relu(a) + b, VALUES | GATES),
        (lambda a, b: F.silu(a) + b, set()),
        (lambda a, b: F.layer_norm(a, (5,)) * b, VALUES),
        (lambda a, b: F.layer_norm(F.silu(a) * b, (5,)), set()),
    ],
    ids=["silu", "swapped", "relu", "shifted", "squared", "inside", "sum", "mixed-sum", "norm",
         "normed"],
)  # fmt: skip
def test_slices_that_may_be_scaled_are_read_off_the_graph(join: Any, free: set[Any]) -> None:
    torch.manual_seed(0)
    assert scaled_slots(Gated(join)) == free


@pytest.mark.parametrize("name", EACH)
def test_balancing_an_expert_changes_nothing_but_scales(name: str) -> None:
    """Each expert as balanced, in the full-size model, computes what it did."""
    from torchlathe.ir.verifying import check_equivalence

    _, program, batches = made(name)
    twin = program.copy()
    with twin.edit() as edit:
        for layer in program.analysis(ExpertLayers).layers:
            alignment = units_of(program, layer, balance=True)
            experts = [
                alignment.balanced(
                    {n: t.double() for n, t in expert_of(program, layer, number).items()}
                )
                for number in range(4)
            ]
            for tensor, axis in layer.tensors.items():
                stacked = torch.stack([expert[tensor] for expert in experts], axis)
                assert not torch.allclose(stacked.float(), program.tensor(tensor))
                edit.set_tensor(tensor, stacked.float())
    found = check_equivalence(program, twin, inputs=((), batches[0]))
    # The weights are rounded to float32 again.
    assert found.max_rel_error < 1e-5


@pytest.mark.parametrize("name", EACH)
def test_copies_that_differ_in_scale_merge_once_they_are_balanced(name: str) -> None:
    _, program, batches = made(name)
    program = program.copy()
    generator = torch.Generator().manual_seed(0)
    with program.edit() as edit:
        for layer in program.analysis(ExpertLayers).layers:
            up, down = (program.tensor(n).detach().clone() for n in layer.tensors)
            for copy in (1, 2, 3):
                factors = 4 ** (2 * torch.rand(24, generator=generator) - 1)
                up[copy], down[copy] = up[0], down[0] / factors
                up[copy, -24:] = up[0, -24:] * factors.unsqueeze(1)
                order = torch.randperm(24, generator=generator)
                rows = torch.cat([order + start for start in range(0, up.shape[1], 24)])
                up[copy], down[copy] = up[copy][rows], down[copy][:, order]
            for tensor, value in zip(layer.tensors, (up, down), strict=True):
                edit.set_tensor(tensor, value)

    def error(spec: str) -> float:
        merged = PassManager(spec).run(program, calibration=batches)
        return float(merged.history[0].verification["max_rel_error"])  # type: ignore[index]

    # Scales are computed from weights in float32, and taken back in it.
    assert error("merge-experts{experts=1,balance=true}") < 1e-5
    assert error("merge-experts{experts=1}") > 1e-2


def test_balancing_needs_alignment() -> None:
    with pytest.raises(OptionError, match="so that they can be aligned"):
        MergeExperts(align=False, balance=True)
