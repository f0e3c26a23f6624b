"""The text of a program: goldens, and what must not show in it."""

import dataclasses
import math
import operator
import os
import subprocess
import sys
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.ir import TensorKind, capture
from torchlathe.ir.printing import dtype_text, program_text

R = torch.randn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """Tied, shared, buffers of each kind, a literal, dictionaries and None."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("offset", torch.zeros(4, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("unread", torch.zeros(3, dtype=torch.int32))

    def forward(self, ids, mask=None, *, bias):
        x = self.embed(ids) * self.scale + self.offset
        x = self.blocks[0](x) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + bias["b"]
        return {"logits": self.head(x), "rest": (x.sum(-1), None, 7)}


def encoder_program():
    torch.manual_seed(0)
    return capture(
        Encoder(),
        (torch.ones(2, 3, dtype=torch.long), None),
        {"bias": {"b": torch.zeros(4)}},
        dynamic_shapes={
            "ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},
            "mask": None,
            "bias": {"b": None},
        },
    )


def test_a_whole_program():
    assert_expected_inline(
        encoder_program().to_text(),
        """\
program Encoder
tensors:
  $embed.weight : parameter f32[10, 4]
  $blocks.0.norm.weight : parameter f32[4]
  $blocks.0.norm.bias : parameter f32[4]
  $blocks.0.up.weight : parameter f32[8, 4]
  $blocks.0.up.bias : parameter f32[8]
  $blocks.0.down.weight : parameter f32[4, 8]
  $scale : buffer f32[]
  $offset : non-persistent buffer bf16[4]
  $lifted_tensor_0 : constant f32[4]
  $head.weight = $embed.weight
  $unread : buffer i32[3]  # not read, carried along
inputs:
  %ids : i64[s0, s1]  # args[0]
  %mask : None  # args[1]
  %bias_b : f32[4]  # bias['b']
ops:
  %embedding = aten.embedding.default($embed.weight, %ids) : f32[s0, s1, 4]  # in embed
  %mul = aten.mul.Tensor(%embedding, $scale) : f32[s0, s1, 4]
  %add = aten.add.Tensor(%mul, $offset) : f32[s0, s1, 4]
  %layer_norm = aten.layer_norm.default(%add, [4], $blocks.0.norm.weight, $blocks.0.norm.bias, 1e-05, False) : f32[s0, s1, 4]  # in blocks.0.norm
  %linear = aten.linear.default(%layer_norm, $blocks.0.up.weight, $blocks.0.up.bias) : f32[s0, s1, 8]  # in blocks.0.up
  %relu = aten.relu.default(%linear) : f32[s0, s1, 8]  # in blocks.0
  %linear_1 = aten.linear.default(%relu, $blocks.0.down.weight) : f32[s0, s1, 4]  # in blocks.0.down
  %add_1 = aten.add.Tensor(%add, %linear_1) : f32[s0, s1, 4]  # in blocks.0
  %lift_fresh_copy = aten.lift_fresh_copy.default($lifted_tensor_0) : f32[4]
  %detach_ = aten.detach.default(%lift_fresh_copy) : f32[4]
  %add_2 = aten.add.Tensor(%add_1, %detach_) : f32[s0, s1, 4]
  %add_3 = aten.add.Tensor(%add_2, %bias_b) : f32[s0, s1, 4]
  %linear_2 = aten.linear.default(%add_3, $embed.weight) : f32[s0, s1, 10]  # in head
  %sum_1 = aten.sum.dim_IntList(%add_3, [-1]) : f32[s0, s1]
outputs:
  {'logits': %linear_2, 'rest': (%sum_1, None, 7)}
""",  # noqa: E501
    )


class Split(nn.Module):
    def forward(self, x):
        a, b = x.split([2, 3], dim=1)
        n = x.shape[0]
        y = torch.full((n, 2), math.inf, dtype=torch.float64)
        return [a * 1e-6 + y.to(torch.float16), (b[1:, ::2].reshape(-1, 1),), (n * 2 + 1) // 2]


def test_arguments_symbols_and_several_results():
    program = capture(Split(), (R(4, 5),), dynamic_shapes=({0: torch.export.Dim("n", min=3)},))
    assert_expected_inline(
        program.to_text(),
        """\
program Split
tensors:
inputs:
  %x : f32[s0, 5]  # args[0]
ops:
  %sym_size_int_1 = aten.sym_size.int(%x, 0) : int s0
  %split_with_sizes = aten.split_with_sizes.default(%x, [2, 3], 1) : (f32[s0, 2], f32[s0, 3])
  %getitem = operator.getitem(%split_with_sizes, 0) : f32[s0, 2]
  %getitem_1 = operator.getitem(%split_with_sizes, 1) : f32[s0, 3]
  %full = aten.full.default([%sym_size_int_1, 2], inf, dtype=f64, device=cpu, pin_memory=False) : f64[s0, 2]
  %mul = aten.mul.Tensor(%getitem, 1e-06) : f32[s0, 2]
  %to = aten.to.dtype(%full, f16) : f16[s0, 2]
  %add = aten.add.Tensor(%mul, %to) : f32[s0, 2]
  %slice_1 = aten.slice.Tensor(%getitem_1, 0, 1, 9223372036854775807) : f32[s0 - 1, 3]
  %slice_2 = aten.slice.Tensor(%slice_1, 1, 0, 9223372036854775807, 2) : f32[s0 - 1, 2]
  %reshape = aten.reshape.default(%slice_2, [-1, 1]) : f32[2*s0 - 2, 1]
outputs:
  [%add, (%reshape,), %sym_size_int_1]
""",  # noqa: E501
    )


def test_axis_terms():
    program = capture(Block(), (R(2, 4),), dynamic_shapes="auto")
    text = program_text(program, axis_terms=True)
    assert text == program.to_text(axis_terms=True)
    plain = [line.partition(" {")[0] for line in text.splitlines()]
    for line, bare in zip(program.to_text().splitlines(), plain, strict=True):
        assert line.startswith(bare)
    up = next(line for line in text.splitlines() if line.startswith("  $up.weight"))
    down = next(line for line in text.splitlines() if line.startswith("  $down.weight"))
    hidden = up.partition("{")[2].split(",")[0]
    assert hidden.endswith(":8")
    assert down.endswith(f", {hidden}}}")
    batch = next(line for line in text.splitlines() if "%x :" in line)
    assert ":s0," in batch


def test_edited_nodes_name_the_pass():
    program = capture(Block(), (R(2, 4),))
    relu = next(n for n in program.nodes if n.target is torch.ops.aten.relu.default)
    with program.edit(by="swap{to=gelu}") as edit:
        new = edit.call(torch.ops.aten.gelu.default, relu.args, {"approximate": "tanh"}, like=relu)
        edit.replace(relu, new)
        scale = edit.add_tensor("scale", torch.ones(8), TensorKind.PARAMETER)
        edit.replace(new, edit.call(torch.ops.aten.mul.Tensor, (new, scale), like=new))
    text = program.to_text()
    assert_expected_inline(
        "\n".join(line for line in text.splitlines() if "swap" in line or "$scale" in line),
        """\
  $scale : parameter f32[8]
  %gelu_default = aten.gelu.default(%linear, approximate='tanh') : f32[2, 8]  # by swap{to=gelu}
  %mul_tensor = aten.mul.Tensor(%gelu_default, $scale) : f32[2, 8]  # by swap{to=gelu}""",
    )


# -- structure of outputs --------------------------------------------------------------------


class Pair(NamedTuple):
    first: object
    second: object


@dataclasses.dataclass
class Record:
    value: torch.Tensor
    extra: object


pytree.register_dataclass(Record)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: x, "%x"),
        (lambda x: (x,), "(%x,)"),
        (lambda x: [x, None], "[%x, None]"),
        (lambda x: Pair(x, 1.5), "Pair(first=%x, second=1.5)"),
        (lambda x: Record(x, {"k": "text"}), "Record(value=%x, extra={'k': 'text'})"),
        (lambda x: OrderedDict(a=x, b=[]), "OrderedDict(a=%x, b=[])"),
        (lambda x: {1: x, "two": (True,)}, "{1: %x, 'two': (True,)}"),
    ],
    ids=["tensor", "tuple", "list", "namedtuple", "dataclass", "ordered", "dict"],
)
def test_output_structure(make, expected):
    class Model(nn.Module):
        def forward(self, x):
            return make(x)

    text = capture(Model(), (), {"x": R(2)}).to_text()
    assert text.splitlines()[-1].strip() == expected


# -- determinism -----------------------------------------------------------------------------


def test_text_does_not_depend_on_what_was_captured_before():
    first = encoder_program()
    for size in (3, 5):
        capture(Block(), (R(size, 4),), dynamic_shapes="auto")
    second = encoder_program()
    assert first.to_text() == second.to_text()
    assert first.to_text() == first.copy().to_text()


def test_text_is_the_same_in_another_process():
    code = (
        "import tests.ir.test_printing as t, sys; sys.stdout.write(t.encoder_program().to_text())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.getcwd()}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert run.stdout == encoder_program().to_text()


def test_no_addresses_and_no_paths():
    program = encoder_program()
    node = next(n for n in program.nodes if n.op == "call_function")
    node.kwargs = {**node.kwargs, "thing": slice(1, None), "other": torch.channels_last}
    text = program.to_text()
    assert "thing=1::, other=channels_last" in text
    assert "0x" not in text
    assert os.path.basename(__file__) not in text


def test_an_unprintable_argument_shows_its_type_only():
    program = encoder_program()
    node = next(n for n in program.nodes if n.op == "call_function")
    node.args = (*node.args, operator.itemgetter(1))
    assert "<itemgetter>" in program.to_text()


def test_dtype_names():
    assert [dtype_text(d) for d in (torch.float32, torch.bool, torch.int64, torch.bfloat16)] == [
        "f32",
        "b8",
        "i64",
        "bf16",
    ]
    assert dtype_text(torch.float8_e4m3fn) == "float8_e4m3fn"
