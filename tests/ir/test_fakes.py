"""Fake values that are found without running an op are those that running it gives."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from torchlathe.ir import capture
from torchlathe.ir.fakes import FakeValues, fake_run, same_value


class Elementwise(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.randn(4, 1, 1))
        self.last = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x.permute(0, 2, 3, 1)
        mean = x.mean(1, keepdim=True)
        other = (x - mean) * (x.square() + 1e-5).rsqrt() + self.bias
        mixed = moved + other.transpose(1, 3).transpose(1, 2)
        half = x.double() * x + x[:, :1] / 2
        return (other * x.transpose(2, 3) - self.last).sum() + mixed.neg().sum() + half.sum()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_elementwise_ops_are_like_their_widest_operand(format: torch.memory_format) -> None:
    x = torch.randn(2, 4, 5, 5).to(memory_format=format)
    program = capture(Elementwise(), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    values = FakeValues(program.fake_mode)
    for node in program.graph.nodes:
        if node.op == "call_function":
            ran = fake_run(node, program.fake_mode)
            assert same_value(values.run(node), ran), node.format_node()
