"""Programs that were exported to core ATen have the norms that all rules know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchlathe.ir import capture
from torchlathe.passes import ZeroInvariantGroups


class Normed(nn.Module):
    """A layer norm and a group norm between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 1)
        self.groups, self.norm = nn.GroupNorm(4, 8), nn.LayerNorm(6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.groups(self.a(x)).relu())
        return self.out(self.norm(x.transpose(1, 2)))


def families(program: Any) -> list[str]:
    return [str(f) for f in program.analysis(ZeroInvariantGroups) if f.prunable]


@pytest.fixture
def inputs() -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, 9),)


def test_decomposed_norms_are_put_back(inputs: tuple[torch.Tensor]) -> None:
    model = Normed().eval()
    plain = capture(model, inputs)
    exported = torch.export.export(model, inputs).run_decompositions()
    assert any("native_layer_norm" in str(n.target) for n in exported.graph.nodes)
    program = capture(exported, inputs)
    names = {str(n.target) for n in program.nodes}
    assert {"aten.layer_norm.default", "aten.group_norm.default"} <= names
    assert families(program) == families(plain)
    # The same kernels compute both, from the same numbers.
    assert torch.equal(program.run(*inputs), plain.run(*inputs))


def test_a_norm_whose_statistics_are_read_stays(inputs: tuple[torch.Tensor]) -> None:
    class Statistics(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, mean, _ = torch.ops.aten.native_layer_norm(x, [9], None, None, 1e-5)
            return y + mean

    program = capture(Statistics().eval(), inputs)
    assert any("native_layer_norm" in str(n.target) for n in program.nodes)
