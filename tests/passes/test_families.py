"""Families of coupled slices: names, roles, pins and what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import Program
from torchlathe.passes import PassManager, ZeroInvariantGroups
from torchlathe.passes.rewrite.erasing.shrink import erase_units


class Net(nn.Module):
    """A module made of a function of itself and the inputs."""

    def __init__(self, function: Any, **modules: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in modules.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def families_of(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    return tl.capture(model.eval(), inputs, **options).analysis(ZeroInvariantGroups)


def roles(family: Any) -> dict[tuple[str, int], str]:
    return {(s.name, s.axis): "writes" if s.writes else "reads" for s in family.slices}


def mlp() -> Net:
    return Net(lambda m, x: m.down(m.up(x).relu()), up=nn.Linear(4, 6), down=nn.Linear(6, 3))


def test_linear_layers() -> None:
    families = families_of(mlp(), torch.randn(2, 4))
    assert [f.name for f in families] == ["up.weight:0", "up.weight:1", "down.weight:0"]
    hidden = families.by_name("up.weight:0")
    assert roles(hidden) == {
        ("up.weight", 0): "writes", ("up.bias", 0): "writes", ("down.weight", 1): "reads",
    }  # fmt: skip
    assert hidden.extent == 6
    assert hidden.prunable
    assert not hidden.pinned
    assert hidden.exactness == "exact"
    assert hidden.parameters_per_unit == 4 + 1 + 3
    assert [s.name for s in hidden.writers] == ["up.weight", "up.bias"]
    assert [s.name for s in hidden.readers] == ["down.weight"]
    assert str(hidden) == "up.weight:0 x 6 (exact)"
    assert families.prunable == (hidden,)
    assert len(families.pinned) == 2
    assert len(families) == 3
    with pytest.raises(KeyError):
        families.by_name("up")
    assert families.of("up.weight") == families.all[:2]
    assert families.of("up.weight", 1) == families.all[1:2]


def test_pins_say_why_and_where() -> None:
    families = families_of(mlp(), torch.randn(2, 4))
    inputs, outputs = families.by_name("up.weight:1"), families.by_name("down.weight:0")
    assert [p.reason for p in inputs.pins] == ["it is an axis of the input args[0]"]
    assert [p.reason for p in outputs.pins] == ["it is an axis of an output of the model"]
    assert not inputs.prunable

    def roll(m: Any, x: Tensor) -> Tensor:
        return m.down(m.up(x).roll(1, -1))

    model = Net(roll, up=nn.Linear(4, 6), down=nn.Linear(6, 3))
    pinned = families_of(model, torch.randn(2, 4)).by_name("up.weight:0")
    assert pinned.pins[0].reason == "its indices change places"
    assert "test_families.py" in pinned.pins[0].where
    assert pinned.pins[0].node
    assert str(pinned).startswith("up.weight:0 x 6 (pinned: its indices change places (")


@torch.library.custom_op("torchlathe_test::families_mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_without_a_rule_pins() -> None:
    model = Net(lambda m, x: m.down(mystery(m.up(x))), up=nn.Linear(4, 6), down=nn.Linear(6, 3))
    families = families_of(model, torch.randn(2, 4))
    name = "torchlathe_test.families_mystery"
    assert families.by_name("up.weight:0").pins[0].reason == f"{name} has no axis rule"
    assert dict(families.axis_map.unruled) == {name: 1}


def test_heads_and_dimensions_have_names() -> None:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 3, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).reshape(2, 3, 8))

    model = Net(attend, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))
    families = families_of(model, torch.randn(2, 3, 8))
    names = {f.name: f for f in families}
    heads = names["qkv.weight:0/1"]
    assert heads.extent == 4
    assert heads.prunable
    assert {(s.name, s.repeat) for s in heads.slices} == {
        ("qkv.weight", 6), ("qkv.bias", 6), ("out.weight", 2),
    }  # fmt: skip
    assert heads.parameters_per_unit == 6 * 8 + 6 + 2 * 8
    # q, k and v are indices of one axis here, so that their dimensions go together.
    assert names["qkv.weight:0/0"].pins[0].reason == "single indices of it are taken"


def test_separate_projections_have_separate_dimensions() -> None:
    def attend(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).view(2, 3, 4, 2).transpose(1, 2) for p in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return m.out(y.transpose(1, 2).reshape(2, 3, 8))

    model = Net(attend, **{n: nn.Linear(8, 8) for n in ("q", "k", "v", "out")})
    names = {f.name: f for f in families_of(model, torch.randn(2, 3, 8)).prunable}
    assert set(names) == {"q.weight:0/0", "q.weight:0/1", "v.weight:0/1"}
    assert {s.name for s in names["q.weight:0/1"].slices} == {
        "q.weight", "q.bias", "k.weight", "k.bias",
    }  # fmt: skip
    assert {s.name for s in names["v.weight:0/1"].slices} == {"v.weight", "v.bias", "out.weight"}


def test_rotary_halves_are_one_family() -> None:
    def turn(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        half = torch.cat((-y[..., 4:], y[..., :4]), -1)
        return m.b(y * m.cos + half * m.sin)

    model = Net(turn, a=nn.Linear(3, 8), b=nn.Linear(8, 2), cos=torch.rand(8), sin=torch.rand(8))
    family = families_of(model, torch.randn(2, 3)).by_name("a.weight:0/0")
    assert family.extent == 4
    assert {s.repeat for s in family.slices} == {2}
    assert family.exactness == "exact"


def test_a_transposed_weight_writes_its_columns() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head((x @ m.w).relu())

    model = Net(run, w=nn.Parameter(torch.randn(4, 6)), head=nn.Linear(6, 2))
    family = families_of(model, torch.randn(2, 4)).by_name("w:1")
    assert roles(family) == {("w", 1): "writes", ("head.weight", 1): "reads"}


@pytest.mark.parametrize(
    "through",
    [
        lambda w: w.t().t(),
        lambda w: w.to(torch.float64).to(torch.float32),
        lambda w: w.view(6, 2, 3).reshape(6, 6),
        lambda w: w.unsqueeze(0).squeeze(0),
        lambda w: w * 2,
        lambda w: w.clone().contiguous(),
    ],
    ids=["t", "cast", "view", "squeeze", "mul", "clone"],
)
def test_roles_through_constant_ops(through: Any) -> None:
    # A square weight on a residual stream has the family on both axes: rows write, columns read.
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        return m.head(x + F.linear(x, through(m.w)))

    model = Net(run, enter=nn.Linear(4, 6), w=nn.Parameter(torch.randn(6, 6)), head=nn.Linear(6, 2))
    for family in families_of(model, torch.randn(2, 4)).prunable:
        found = roles(family)
        assert found["w", 0] == "writes"
        assert found["w", 1] == "reads"
        assert found["head.weight", 1] == "reads"


def test_products_of_weights_read_what_they_contract() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.linear(m.enter(x).sigmoid(), m.b @ m.a))

    model = Net(run, enter=nn.Linear(4, 6), a=nn.Parameter(torch.randn(2, 6)),
                b=nn.Parameter(torch.randn(5, 2)), head=nn.Linear(5, 2))  # fmt: skip
    families = families_of(model, torch.randn(3, 4))
    assert roles(families.by_name("enter.weight:0"))["a", 1] == "reads"
    # The constant cannot move into a bias here, but a column of zeros takes nothing of it.
    assert families.by_name("enter.weight:0").zeroed_by == "readers"
    assert roles(families.by_name("b:0")) == {("b", 0): "writes", ("head.weight", 1): "reads"}


def test_pieces_of_a_chunked_weight() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        q, k = m.w.chunk(2)
        return m.head(F.linear(x, q) * F.linear(x, k))

    model = Net(
        run, enter=nn.Linear(4, 6), w=nn.Parameter(torch.randn(10, 6)), head=nn.Linear(5, 2)
    )
    families = families_of(model, torch.randn(3, 4))
    assert roles(families.by_name("enter.weight:0"))["w", 1] == "reads"
    both = families.by_name("w:0/0")
    assert both.extent == 5
    assert both.slices[0].repeat == 2


def test_grouped_transposed_convolution() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.up(m.stem(x).relu()))

    model = Net(run, stem=nn.Conv2d(3, 8, 1), up=nn.ConvTranspose2d(8, 4, 2, groups=2),
                head=nn.Conv2d(4, 2, 1))  # fmt: skip
    families = families_of(model, torch.randn(1, 3, 4, 4))
    groups, inside = families.by_name("stem.weight:0/0"), families.by_name("stem.weight:0/1")
    # The groups reach the result; channels in a group are summed over.
    assert roles(groups)["up.weight", 0] == "writes"
    assert roles(inside)["up.weight", 0] == "reads"
    assert [s.name for s in inside.writers] == ["stem.weight", "stem.bias"]


def test_tied_embedding_writes_and_is_read() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embed(tokens)
            return self.head(x + self.mix(x).relu())

    families = families_of(Tied(), torch.tensor([[1, 2, 3]]))
    stream = families.by_name("embed.weight:1")
    assert roles(stream) == {
        ("embed.weight", 1): "writes", ("mix.weight", 0): "writes", ("mix.weight", 1): "reads",
        ("mix.bias", 0): "writes",
    }  # fmt: skip
    assert stream.exactness == "exact"
    assert families.by_name("embed.weight:0").pins


def test_a_table_of_positions_is_zeroed_too() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.enter(x) + m.positions)

    model = Net(run, enter=nn.Linear(4, 6), positions=torch.randn(3, 6), head=nn.Linear(6, 2))
    program = tl.capture(model.eval(), (torch.randn(2, 3, 4),))
    stream = program.analysis(ZeroInvariantGroups).of("positions", 1)[0]
    assert roles(stream)["positions", 1] == "writes"
    assert stream.exactness == "exact"
    after = PassManager("structured-erase{sparsity=0.5}", verify="full").run(program)
    assert after.entries["positions"].tensor.shape == (3, 3)
    assert after.zeroed["positions"][1].tolist() == after.zeroed["enter.weight"][0].tolist()


def test_batch_norm_statistics_are_owned_but_not_written() -> None:
    model = Net(lambda m, x: m.head(m.bn(m.stem(x)).relu()),
                stem=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4), head=nn.Conv2d(4, 2, 1))  # fmt: skip
    family = families_of(model, torch.randn(1, 3, 4, 4)).by_name("stem.weight:0")
    kinds = {s.name: (s.kind.value, s.writes) for s in family.slices}
    assert kinds["bn.running_mean"] == ("buffer", False)
    assert kinds["bn.weight"] == ("parameter", True)
    assert family.parameters_per_unit == 3 + 1 + 1 + 1 + 2


def test_pairs_of_units_are_pinned() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        return m.head((x[:, :, None] * x[:, None, :]).flatten(1))

    model = Net(run, enter=nn.Linear(4, 3), head=nn.Linear(9, 2))
    family = families_of(model, torch.randn(2, 4)).by_name("enter.weight:0")
    assert family.pins[0].reason == "an axis of enter.weight holds pairs of its indices"


def test_the_prediction_of_parameters_per_unit() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        return m.head(x + m.mix(x).relu())

    model = Net(run, enter=nn.Linear(4, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, 2))
    program = tl.capture(model.eval(), (torch.randn(2, 4),))
    before = sum(t.numel() for t in program.parameters.values())
    (family,) = program.analysis(ZeroInvariantGroups).prunable
    erase_units(program, {family: torch.tensor([2])})
    after = sum(t.numel() for t in program.parameters.values())
    assert before - after == family.parameters_per_unit == 5 + (36 - 25) + 1 + 2


def test_networkx() -> None:
    graph = families_of(mlp(), torch.randn(2, 4)).to_networkx()
    assert graph.nodes["up.weight:0"] == {
        "kind": "family", "extent": 6, "exactness": "exact", "pinned": False,
    }  # fmt: skip
    assert graph.nodes["down.weight"] == {"kind": "parameter"}
    assert graph.edges["up.weight:0", "down.weight"] == {"axis": 1, "role": "reads"}
    assert graph.number_of_nodes() == 3 + 4


def test_statistics_and_sameness() -> None:
    program: Program = tl.capture(mlp().eval(), (torch.randn(2, 4),))
    analysis = ZeroInvariantGroups()
    one, two = analysis.compute(program), analysis.compute(program.copy())
    assert analysis.same(one, two)
    assert analysis.statistics(one) == {"families": 3, "prunable": 1, "pinned": 2, "units": 6}
    erased = PassManager("structured-erase").run(program)
    assert not analysis.same(one, analysis.compute(erased))


def test_families_do_not_depend_on_identities() -> None:
    plain = families_of(mlp(), torch.randn(2, 4))
    padded = Net(
        lambda m, x: m.down(m.up(x).clone().relu().contiguous().view(2, 6).transpose(0, 1).t()),
        up=nn.Linear(4, 6), down=nn.Linear(6, 3),
    )  # fmt: skip
    other = families_of(padded, torch.randn(2, 4))
    assert [(f.name, f.slices) for f in plain] == [(f.name, f.slices) for f in other]
