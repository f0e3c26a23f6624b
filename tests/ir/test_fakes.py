"""Fake values that are found without running an op are those that running it gives."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim

from torchlathe.ir import capture
from torchlathe.ir.fakes import FakeValues, fake_run, same_value
from torchlathe.ir.strides import StrideSampler


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


class Views(torch.nn.Module):
    """Results with gaps, overlaps and orders of their own, of a dynamic batch and length."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x[..., 2:6]
        every = x[:, ::2]
        heads = half.view(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
        repeated = heads[:, :, None].expand(-1, -1, 3, -1, -1)
        first, second = x.split(4, dim=-1)
        last = x.movedim(1, -1)[..., 1:]
        return half, every, heads, repeated, first * 2, second, last.unsqueeze(0)


@pytest.mark.parametrize(
    ("shapes", "least"),
    [
        pytest.param(({0: Dim.DYNAMIC},), 6, id="batch"),
        # Here most strides are multiples of the length.
        pytest.param(({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},), 3, id="batch-and-length"),
        pytest.param(None, 6, id="static"),
    ],
)
def test_known_shapes_give_the_strides_that_running_gives(shapes, least: int) -> None:
    program = capture(Views(), (torch.randn(2, 6, 8),), dynamic_shapes=shapes)
    values = FakeValues(program.fake_mode)
    told = 0
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor | list | tuple):
            continue
        tensors = [value] if isinstance(value, torch.Tensor) else value
        found = values.resized(node, [list(t.shape) for t in tensors])
        if found is not None:  # else the op is run, as it always may be
            assert same_value(found, fake_run(node, program.fake_mode)), node.format_node()
            told += 1
    assert told >= least


def test_strides_with_a_symbol_in_them_are_left_to_running_the_op() -> None:
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)

    class Cut(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 2)[1:]  # the stride of the last axis is 8 times the length

    program = capture(Cut(), (torch.randn(2, 6, 8),), dynamic_shapes=shapes)
    sampler = StrideSampler()
    cut = next(n for n in program.graph.nodes if "slice" in n.name)
    assert sampler.strides(cut, [list(cut.meta["val"].shape)]) is None
    whole = next(n for n in program.graph.nodes if "transpose" in n.name)
    assert whole.meta["val"].stride()[0] == 1
