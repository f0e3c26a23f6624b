"""The segment graph: where it is cut, what is removable, and why the rest is not."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import networkx
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import torchlathe as tl
from tests.passes.stacked_unets import StackedUnets
from torchlathe.ir import Program
from torchlathe.passes import Segments
from torchlathe.passes.analysis.constants import constants_with
from torchlathe.passes.analysis.dominance import PostDominators
from torchlathe.passes.analysis.segments import SegmentGraph


def graph_of(model: nn.Module, *args: torch.Tensor) -> SegmentGraph:
    return tl.capture(model.eval(), args).analysis(Segments)


@pytest.fixture(scope="module")
def unets() -> SegmentGraph:
    return graph_of(StackedUnets(), torch.randn(2, 3, 16, 16))


# -- StackedUnets ----------------------------------------------------------------------------------


def test_stacked_unets_have_22_segments_of_which_6_are_removable(unets: SegmentGraph) -> None:
    assert len(unets) == 22
    assert [s.name for s in unets.removable] == [
        "one.up2",
        "one.up1",
        "one.out",
        "two.up2",
        "two.up1",
        "two.out",
    ]


def test_their_lengths_are_those_of_the_published_graph(unets: SegmentGraph) -> None:
    one = [5, 3, 5, 4, 1, 1, 1, 5, 1, 4]
    two = [3, 3, 5, 4, 1, 1, 1, 5, 1, 4]
    assert [len(s.nodes) for s in unets] == [*one, *two, 1, 4]
    assert [s.kind for s in unets].count("joint") == 7
    assert unets.segments[-1].kind == "output"


def test_the_second_unet_dies_with_its_last_segment(unets: SegmentGraph) -> None:
    branch = unets.by_name("two.out").branch
    assert branch is not None
    assert {name.partition(".")[0] for name in branch.parameters} == {"two"}
    assert branch.parameter_count == sum(p.numel() for p in StackedUnets().two.parameters())
    assert branch.name == "two"  # the module that dies as a whole
    own = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    assert branch.zeroed == tuple(f"two.out.{name}" for name in own)


def test_why_others_stay(unets: SegmentGraph) -> None:
    def reason(name: str) -> str:
        return unets.by_name(name).reason

    assert "what reads it needs it" in reason("one.stem")
    assert "no parameters" in unets.segments[5].reason  # the resize beside up2
    assert "not zero when its parameters are: %add" in unets.segments[4].reason
    assert "output of the model" in reason("head")


def test_the_networkx_graph_has_the_forks_and_joints(unets: SegmentGraph) -> None:
    graph = unets.to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    assert graph.number_of_nodes() == 22
    joints = [n for n, data in graph.nodes(data=True) if data["kind"] == "joint"]
    assert all(graph.in_degree(joint) == 2 for joint in joints)
    assert sum(graph.nodes[n]["removable"] for n in graph) == 6
    reached = networkx.descendants(graph, "one.stem")
    assert len(reached) == 21


# -- chains ----------------------------------------------------------------------------------------


def test_segments_partition_the_calls_that_carry_data(unets: SegmentGraph) -> None:
    nodes = [node for segment in unets for node in segment.nodes]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == set(unets.flow.nodes)


def test_names_are_stable_and_unique() -> None:
    def names() -> list[str]:
        return [s.name for s in graph_of(StackedUnets(), torch.randn(2, 3, 16, 16))]

    assert names() == names()
    assert len(set(names())) == 22


def test_two_captures_are_the_same_and_another_model_is_not() -> None:
    x = torch.randn(2, 3, 16, 16)
    a, b = graph_of(StackedUnets(), x), graph_of(StackedUnets(), x)
    assert Segments().same(a, b)
    assert not Segments().same(a, graph_of(nn.Sequential(nn.Conv2d(3, 4, 1)), x))
    assert Segments().statistics(a)["removable"] == 6


class _Beside(nn.Module):
    """A table of positions and a size are beside the data, and cut nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) + self.table(torch.arange(x.shape[1]))
        return self.b(y + torch.zeros_like(y))


def test_what_is_beside_the_data_cuts_nothing() -> None:
    graph = graph_of(_Beside(), torch.randn(2, 5, 4))
    assert [s.name for s in graph] == ["a..b"]
    assert set(graph.segments[0].parameters) == {
        "a.weight", "a.bias", "b.weight", "b.bias", "table.weight"
    }  # fmt: skip


# -- verdicts --------------------------------------------------------------------------------------


class _Joined(nn.Module):
    """``join(x, branch(x))``, with more parameters around."""

    def __init__(self, branch: nn.Module, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.enter, self.branch, self.leave = nn.Linear(4, 6), branch, nn.Linear(6, 3)
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.enter(x))
        return self.leave(self.join(x, self.branch(x)))


def _mlp(*last: nn.Module, width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, width), *last)


class _Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class _Repeat(nn.Module):
    """Its operand is the larger one of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[:, None].expand(-1, 3, -1)


Joint = Callable[..., torch.Tensor]

REMOVABLE: dict[str, tuple[nn.Module, Joint]] = {
    "add": (_mlp(), torch.add),
    "sub": (_mlp(), torch.sub),
    "sub-from": (_mlp(), lambda x, y: y - x),
    "scaled": (_mlp(), lambda x, y: torch.add(x, y, alpha=0.5)),
    "relu": (_mlp(nn.ReLU()), torch.add),
    "gelu": (_mlp(nn.GELU(), nn.Dropout(0.1)), torch.add),
    "norm": (_mlp(nn.LayerNorm(6)), torch.add),
    "only-norm": (nn.LayerNorm(6), torch.add),
    "tanh-of-zero": (_mlp(nn.Tanh(), nn.Softshrink()), torch.add),
}
STAYS: dict[str, tuple[nn.Module, Joint, str]] = {
    "sigmoid": (_mlp(nn.Sigmoid()), torch.add, "it holds 0.5 when"),
    "softmax": (_mlp(nn.Softmax(-1)), torch.add, "not zero when"),
    "gate": (_mlp(), torch.mul, "other factor along"),
    "sigmoid-gate": (_mlp(nn.Sigmoid()), torch.mul, "it holds 0.5 when"),
    "maximum": (_mlp(), torch.maximum, "what reads it needs it"),
    "no-parameters": (nn.ReLU(), torch.add, "no parameters"),
    "bias-less-constant": (_mlp(nn.Threshold(0.5, 2.0)), torch.add, "it holds 2 when"),
    "half-of-it": (_mlp(width=1), torch.add, ""),
    "larger": (_Repeat(), lambda x, y: (x[:, None] + y).sum(1), "not the shape and dtype"),
    "wider": (_mlp(_Cast()), lambda x, y: (x + y).float(), "not the shape and dtype"),
}


def _verdict(branch: nn.Module, join: Callable[..., torch.Tensor]) -> tuple[bool, str]:
    graph = graph_of(_Joined(branch, join), torch.randn(2, 4))
    last = next(n for n, s in reversed(list(enumerate(graph))) if "branch" in s.name)
    segment = graph.segments[last]
    return segment.removable, segment.reason


@pytest.mark.parametrize("case", REMOVABLE)
def test_removable(case: str) -> None:
    assert _verdict(*REMOVABLE[case]) == (True, "")


@pytest.mark.parametrize("case", STAYS)
def test_not_removable(case: str) -> None:
    branch, join, why = STAYS[case]
    removable, reason = _verdict(branch, join)
    assert why in reason
    assert removable is (case == "half-of-it")  # broadcast along: x keeps the shape of the sum


class _Shared(nn.Module):
    """Both branches, and the way between them, read one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.own = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.linear(x))
        y = y + self.linear(torch.relu(y))
        return y + F.linear(self.own(torch.relu(y)), self.linear.weight)


def test_a_shared_weight_is_nobodys_own() -> None:
    graph = graph_of(_Shared(), torch.randn(2, 6))
    assert [s.name for s in graph.removable] == ["own"]
    branch = graph.removable[0].branch
    assert branch is not None
    assert branch.parameters == ("own.weight",)


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(y)


def test_every_input_has_to_be_read() -> None:
    graph = graph_of(_TwoInputs(), torch.randn(2, 4), torch.randn(2, 4))
    assert not graph.removable
    assert "the input args[1] would not be read" in graph.by_name("b").reason


class _Shapes(nn.Module):
    """The branch's size is read beside its data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(x)
        return torch.tanh(x) + y + torch.zeros_like(y)


def test_a_branch_whose_shape_is_read_stays() -> None:
    graph = graph_of(_Shapes(), torch.randn(2, 4))
    assert "its shape is read" in graph.by_name("b").reason


class _Cut(nn.Module):
    """Part of what is read after a concatenation is exactly one operand of it."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 6)
        self.c, self.d = nn.Linear(10, 3), nn.Linear(6, 3)
        self.apart = apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        joined = torch.cat([self.a(x), self.b(x)], -1)
        return self.c(joined) + self.d(joined[:, 4:]) if self.apart else self.c(joined)


def test_operands_of_a_concatenation() -> None:
    graph = graph_of(_Cut(apart=False), torch.randn(2, 4))
    assert [s.name for s in graph.removable] == ["a", "b"]
    assert all(b.families for b in graph.branches)
    apart = graph_of(_Cut(apart=True), torch.randn(2, 4))
    assert [s.name for s in apart.removable][:1] == ["a"]
    assert "nothing else would be left" in apart.by_name("b").reason


class _Same(nn.Module):
    """The operands of the concatenation have the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.c = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.a(x))
        return self.c(torch.cat([y, y * self.scale], -1))


def test_channels_of_two_operands_cannot_go_with_one() -> None:
    graph = graph_of(_Same(), torch.randn(2, 4))
    assert not graph.removable
    (branch,) = graph.branches
    assert "its channels are those of a.weight too" in branch.reason


# -- attention -------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def test_attention_and_mlp_die_with_their_last_layer() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(8, 8), _Block()), torch.randn(2, 5, 8))
    assert [s.name for s in graph.removable] == ["1.o", "1.norm2..down"]
    attention = graph.by_name("1.o").branch
    assert attention is not None
    assert attention.name == "1.norm1..o"
    assert {n.split(".")[1] for n in attention.parameters} == {"norm1", "q", "k", "v", "o"}
    assert attention.zeroed == ("1.o.weight", "1.o.bias")


# -- what holds constants --------------------------------------------------------------------------


CONSTANTS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], float | None]] = {
    "product": (lambda x, p: x * p, 0.0),
    "sum": (lambda x, p: x + p, None),
    "sigmoid": (lambda x, p: torch.sigmoid(x * p), 0.5),
    "cos-after-view": (lambda x, p: torch.cos((x * p).view(-1)), 1.0),
    "matmul": (lambda x, p: x @ (p * 2).t(), 0.0),
    "reciprocal": (lambda x, p: x * torch.reciprocal(p), None),
    "reciprocal-times-zero": (lambda x, p: p * torch.reciprocal(p), None),
    "nothing-over-nothing": (lambda x, p: p / p.sum() * 0.0, None),
    "over-zero": (lambda x, p: x / p, None),
    "over-two": (lambda x, p: x * p / 2, 0.0),
    "normalised": (lambda x, p: F.normalize(x * p), 0.0),
    "softmax": (lambda x, p: torch.softmax(x * p, -1), None),
    "where": (lambda x, p: torch.where(x > 0, x * p, 0.0), 0.0),
    "where-else": (lambda x, p: torch.where(x > 0, x * p, 1.0), None),
    "masked": (lambda x, p: (x * p).masked_fill(x > 0, 0.0), 0.0),
    "padded-by-ones": (lambda x, p: F.pad(x * p, (1, 1), value=1.0), None),
    "padded": (lambda x, p: F.pad(torch.exp(x * p), (1, 1), value=1.0), 1.0),
    "pooled": (lambda x, p: F.avg_pool1d((x * p)[:, None], 2, padding=1), 0.0),
    "ones-pooled": (lambda x, p: F.avg_pool1d(torch.exp(x * p)[:, None], 2, padding=1), None),
    "same-parts": (lambda x, p: torch.cat([x * p, (x * p).relu()]), 0.0),
    "other-parts": (lambda x, p: torch.cat([x * p, (x * p).cos()]), None),
    "centred": (lambda x, p: F.layer_norm(x * p, (4,)), 0.0),
    "layer-norm-with-bias": (lambda x, p: F.layer_norm(x * p, (4,), None, torch.ones(4)), None),
    "indices": (lambda x, p: (x * p).max(-1)[1].float(), None),
}


class _Constants(nn.Module):
    """All cases side by side, since a capture takes longer than a case."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(function(x, self.p) for function, _ in CONSTANTS.values())


@pytest.fixture(scope="module")
def constants() -> Program:
    return tl.capture(_Constants().eval(), (torch.randn(4, 4),))


@pytest.mark.parametrize("case", CONSTANTS)
def test_constants(case: str, constants: Program) -> None:
    want = CONSTANTS[case][1]
    number = list(CONSTANTS).index(case)
    found = constants_with([constants.tensor_nodes["p"]], constants.nodes)
    outputs: Any = constants.output_node.args[0]
    assert found.get(outputs[number]) == want
    if want is not None:
        x = torch.randn(4, 4)
        held = constants.run(x, replace_tensor=lambda name, t: torch.zeros_like(t))[number]
        # float32: the constant itself is exact, what follows it rounds once per op.
        torch.testing.assert_close(held, torch.full_like(held, want), rtol=1e-6, atol=0)


# -- post-dominators -------------------------------------------------------------------------------


def _random_graph(seed: int) -> fx.Graph:
    chosen = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(chosen.randint(3, 40)):
        count = min(len(nodes), chosen.randint(1, 3))
        recent = nodes[-chosen.randint(count, len(nodes)) :]
        nodes.append(graph.call_function(operator.add, tuple(chosen.sample(recent, count))))
    graph.output(tuple(chosen.sample(nodes, min(2, len(nodes)))))
    return graph


@hypothesis.given(seed=st.integers(0, 2**32))
@hypothesis.settings(max_examples=60)
def test_post_dominators_are_those_of_networkx(seed: int) -> None:
    graph = _random_graph(seed)
    output = next(iter(reversed(graph.nodes)))
    backwards = networkx.DiGraph((user, node) for node in graph.nodes for user in node.users)
    parents = networkx.immediate_dominators(backwards, output)
    want: dict[fx.Node, set[fx.Node]] = {output: {output}}
    for node in parents:
        above: fx.Node | None = node
        while above is not None:
            want.setdefault(above, set()).add(node)
            parent = parents.get(above)
            above = None if parent is above else parent
    found = PostDominators(graph)
    for node, dying in want.items():
        assert set(found.subtree(node)) == dying


def test_what_dies_is_what_dead_code_elimination_takes(unets: SegmentGraph) -> None:
    program: Program = unets.flow.program
    for branch in unets.branches:
        copy = program.copy()
        names = {node.name for node in branch.nodes}
        (joint,) = (n for n in copy.nodes if n.name == branch.joints[0].name)
        (gone,) = (n for n in joint.all_input_nodes if n.name == branch.exit.name)
        (other,) = (n for n in joint.all_input_nodes if n is not gone)
        joint.replace_all_uses_with(other)
        copy.graph.eliminate_dead_code()
        left = {n.name for n in copy.nodes}
        before = {n.name for n in unets.flow.nodes}
        assert before - left == names | {joint.name}
