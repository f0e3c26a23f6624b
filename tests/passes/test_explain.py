"""What `explain` says of tensors, axes, indices, families, modules, nodes and ops."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from torchlathe.ir import InputError, Program, capture
from torchlathe.ir.axes import AxisTerms
from torchlathe.passes import ZeroInvariantGroups, explain
from torchlathe.passes.analysis.explain import Coupled, Explanation, FamilyPart


class Net(nn.Module):
    """A stream with a fused projection, a norm, a residual sum and a gate without a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.soft = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)
        self.head_twin = nn.Linear(6, 3)
        self.head_twin.weight = self.head.weight
        self.unread = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        b, n, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, w))
        y = torch.softmax(self.soft(x), -1)
        return self.head(y) + self.head_twin(y)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Net().eval(), (torch.randn(2, 3, 5),))


def part(explanation: Explanation, name: str) -> FamilyPart:
    return next(p for p in explanation.families if p.name == name)


def coupled(family: FamilyPart, tensor: str) -> Coupled:
    return next(c for c in family.coupled if c.tensor == tensor)


def test_an_index_is_located_in_products(program: Program) -> None:
    found = explain(program, "qkv.weight:0[17]")
    assert (found.kind, found.name) == ("channel", "qkv.weight:0[17]")
    axis = found.axes[0]
    assert (axis.extent, axis.structure) == (24, "3 x 4 x 2")
    # 17 = 2 * 8 + 0 * 2 + 1
    assert axis.units == (("qkv.weight:0/0", 2), ("qkv.weight:0/1", 0), ("qkv.weight:0/2", 1))
    assert "index 17 is unit 2 of qkv.weight:0/0" in str(found)


def test_an_index_is_located_in_pieces() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], -1))

    made = capture(Joined().eval(), (torch.randn(2, 3),))
    axis = explain(made, "c.weight:1[6]").axes[0]
    assert axis.structure == "[4 | 5]"
    assert axis.units == (("b.weight:0", 2),)
    assert explain(made, "c.weight:1[-9]").axes[0].units == (("a.weight:0", 0),)


def test_coupled_slices_name_the_op_that_joined_them(program: Program) -> None:
    family = part(explain(program, "stem.weight:0"), "stem.weight:0")
    assert (family.units, family.prunable) == (8, True)
    assert family.parameters_per_unit == sum(
        c.parameters_per_unit for c in family.coupled if c.kind == "parameter"
    )
    read = coupled(family, "qkv.weight")
    assert (read.role, read.axis, read.module) == ("reads", 1, "qkv")
    assert [op.op for op in read.joined] == ["aten.linear.default"]
    assert read.joined[0].module == "qkv"
    assert "test_explain.py" in (read.joined[0].where or "")
    assert [op.op for op in read.carried] == [
        "stem.weight",
        "aten.linear.default",
        "aten.layer_norm.default",
        "aten.linear.default",
        "qkv.weight",
    ]
    # Both write into the residual sum, which is what made them one.
    assert [op.op for op in coupled(family, "out.weight").joined] == ["aten.add.Tensor"]
    assert coupled(family, "stem.weight").joined == ()


def test_a_split_axis_names_the_op_that_split_it(program: Program) -> None:
    heads = part(explain(program, "qkv.weight:0/1"), "qkv.weight:0/1")
    read = coupled(heads, "out.weight")
    assert [op.op for op in read.joined] == ["aten.view.default", "aten.linear.default"]
    assert read.indices_per_unit == 2


def test_corrections_and_losses_are_told(program: Program) -> None:
    corrected = explain(program, "stem.weight:0").families[0]
    assert corrected.exactness == "exact-after-correction"
    assert any("layer_norm" in reason for reason in corrected.reasons)
    lossy = explain(program, "soft.weight:0").families[0]
    assert lossy.exactness == "approximate"
    assert any("approximate=true" in advice for advice in lossy.advice)


def test_a_pin_names_its_op_and_the_way_there(program: Program) -> None:
    found = explain(program, "qkv.weight:0/0").families[0]
    assert found.exactness == "pinned"
    pin = found.pins[0]
    assert pin.op is not None
    assert pin.op.op == "aten.unbind.int"
    assert pin.carried[0].op == "qkv.weight"
    assert pin.carried[-1] == pin.op
    assert any("qkv.weight:1 (family stem.weight:0" in advice for advice in found.advice)


def test_outputs_are_reached(program: Program) -> None:
    found = explain(program, "head.weight:0").families[0]
    assert found.pins[0].op is not None
    assert found.pins[0].op.op == "the output"
    assert found.pins[0].carried[-1].op == "the output"


def test_tied_names_lead_to_one_tensor(program: Program) -> None:
    found = explain(program, "head_twin.weight:1")
    assert found.name == "head.weight:1"
    assert "head_twin.weight is tied to head.weight" in found.notes[0]


def test_a_module_has_all_axes_of_its_tensors(program: Program) -> None:
    found = explain(program, "norm")
    assert found.kind == "module"
    assert [(a.tensor, a.axis) for a in found.axes] == [("norm.weight", 0), ("norm.bias", 0)]
    assert [f.name for f in found.families] == ["stem.weight:0"]


def test_a_node_says_what_it_pins_and_what_it_needs(program: Program) -> None:
    node = explain(program, "%layer_norm")
    assert node.kind == "node"
    assert any("takes a correction when units of stem.weight:0 go" in n for n in node.notes)
    batch = node.families[0]
    assert batch.name == "%layer_norm:0"
    assert "input" in batch.pins[0].reason
    unbind = explain(program, "unbind")
    assert any("pins qkv.weight:0/0" in note for note in unbind.notes)
    assert {a.tensor for a in unbind.axes} == {"%getitem", "%getitem_1", "%getitem_2"}


def test_an_op_is_all_of_its_nodes(program: Program) -> None:
    found = explain(program, "aten.linear")
    assert found.kind == "op"
    assert len({a.tensor for a in found.axes}) == 6
    assert explain(program, "aten.linear.default").axes == found.axes


def test_it_is_plain_json(program: Program) -> None:
    for name in ("qkv.weight:0[3]", "qkv", "aten.view", "soft.bias"):
        found = explain(program, name)
        data = found.to_dict()
        assert json.loads(json.dumps(data)) == data
        assert data["families"][0]["name"] == found.families[0].name


def test_text_is_cut_to_a_limit(program: Program) -> None:
    found = explain(program, "stem.weight:0")
    assert "more, of which" in found.text(3)
    assert "more, of which" not in found.text(None)
    assert found.rich().plain == str(found)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("qvk.weight", "nothing in Net is called 'qvk.weight'", "qkv.weight"),
        ("stem", None, None),
        ("linear_99", "is called 'linear_99'", "linear_"),
        ("qkv.weight:2", "qkv.weight has 2 axes, and 2 is none", "0 to 1"),
        ("qkv.weight:0[24]", "has 24 indices, and 24 is none", "0 to 23"),
        ("unread", "never reads", None),
        ("", "is called ''", "name a parameter"),
    ],
    ids=["typo", "good", "node", "axis", "index", "unread", "empty"],
)
def test_wrong_names_are_told(
    program: Program, name: str, message: str | None, hint: str | None
) -> None:
    if message is None:
        explain(program, name)
        return
    with pytest.raises(InputError, match=r".") as caught:
        explain(program, name)
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_the_trail_ends_at_the_atom(program: Program) -> None:
    """Following the record from any tensor's axis leads to each of its free atoms."""
    axis_map = program.analysis(AxisTerms)
    for node in program.tensor_nodes.values():
        for axis, term in enumerate(axis_map.terms(node)):
            for atom in axis_map.atoms_of(term):
                steps = axis_map.trail(node, axis, atom)
                assert len({a.number for a, _ in steps}) == len(steps)
                assert all(n.op == "call_function" for _, n in steps)
                assert steps or term is atom


def test_every_slice_of_every_family_is_reached(program: Program) -> None:
    for family in program.analysis(ZeroInvariantGroups):
        for slice_ in explain(program, family.name).families[0].coupled:
            assert slice_.carried, (family.name, slice_.tensor)
            assert slice_.carried[-1].op == slice_.tensor
