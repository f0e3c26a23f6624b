"""The Program itself: reading, running, copying, caching."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.ir import Analysis, TensorKind, capture, info
from torchlathe.ir.interpreting import run_flat

R = torch.randn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)
        self.tied = nn.Linear(5, 2, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("index", torch.tensor([1, 0]))

    def forward(self, x, mask=None):
        y = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        y, _ = self.rnn(y)
        scores = torch.full((y.shape[1],), torch.finfo(torch.float32).min)
        scores = torch.where(y.mean((0, 2)) > 0, 0.0, scores).softmax(0)
        y = (y * scores[None, :, None]).sum(1)
        noise = torch.zeros(2) + torch.arange(2, dtype=torch.float32)
        return {"a": self.head(y)[:, self.index] + noise, "b": self.tied(y).to(torch.float32)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Net().eval()
    model.norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def program(model):
    return capture(model, (R(2, 3, 4, 4),), dynamic_shapes="auto")


# -- reading ---------------------------------------------------------------------------------


def test_the_graph_is_flat_and_in_lifted_form(program):
    nodes = list(program.nodes)
    kinds = [n.op for n in nodes]
    placeholders = kinds.count("placeholder")
    assert kinds == [
        *["placeholder"] * placeholders,
        *["call_function"] * (len(kinds) - placeholders - 1),
        "output",
    ]
    named = [info(n).tensor for n in nodes[:placeholders]]
    assert [n for n in named if n is not None] == list(program.tensor_nodes)
    assert named[-1] is None
    assert isinstance(program.output_node.args[0], tuple)
    assert all("val" in n.meta for n in nodes[:-1])


def test_tensors_and_parameters(program, model):
    assert set(program.tensor_nodes) == set(program.entries)
    assert program.parameters.keys() == dict(model.named_parameters()).keys()
    assert all(p is dict(model.named_parameters())[n] for n, p in program.parameters.items())
    assert program.tensor("tied.weight") is model.head.weight
    assert program.entries["index"].kind is TensorKind.BUFFER
    with pytest.raises(KeyError):
        program.tensor("nothing")


def test_repr_is_one_line(program):
    count = sum(p.numel() for p in program.parameters.values())
    assert repr(program).startswith("<Program of Net: ")
    assert f"{count:,} parameters>" in repr(program)


# -- running ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_run_equals_the_model(program, model, batch):
    x = R(batch, 3, 4, 4)
    result, expected = program.run(x), model(x)
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(result[key], value)


def test_run_in_float64_is_close_to_the_double_model(program, model):
    import copy

    x = R(3, 3, 4, 4)
    result = program.run(x, dtype=torch.float64)
    twin = copy.deepcopy(model).double()
    torch.manual_seed(0)
    with torch.no_grad():
        y = torch.relu(twin.norm(twin.conv(x.double()))).flatten(2).transpose(1, 2)
        y, _ = twin.rnn(y)
        scores = torch.full((16,), torch.finfo(torch.float32).min, dtype=torch.float64)
        scores = torch.where(y.mean((0, 2)) > 0, 0.0, scores).softmax(0)
        y = (y * scores[None, :, None]).sum(1)
        expected = twin.head(y)[:, [1, 0]] + torch.tensor([0.0, 1.0])
    assert result["a"].dtype is torch.float64
    # The cast to float32 in the forward code follows the dtype of the run.
    assert result["b"].dtype is torch.float64
    torch.testing.assert_close(result["a"], expected, rtol=1e-12, atol=1e-12)
    assert (result["a"] - program.run(x)["a"]).abs().max() > 0


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(4, 5, bidirectional=True),
        nn.GRU(4, 5),
        nn.MultiheadAttention(4, 2),
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_float64_runs_of_layers_that_create_tensors(layer):
    import copy

    class Wrap(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if isinstance(self.layer, nn.MultiheadAttention):
                return self.layer(x, x, x)[0]
            if isinstance(self.layer, nn.Sequential):
                return self.layer(x.flatten(0, 1))
            y = self.layer(x)
            return y[0] if isinstance(y, tuple) else y

    model = Wrap().eval()
    x = R(3, 2, 4)
    result = capture(model, (x,)).run(x, dtype=torch.float64)
    expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_tensors_can_be_replaced_at_their_use(program, model):
    asked = []

    def without_bias(name, tensor):
        asked.append(name)
        return torch.zeros_like(tensor) if name == "head.bias" else tensor

    x = R(2, 3, 4, 4)
    result = program.run(x, replace_tensor=without_bias)["a"]
    torch.testing.assert_close(result, model(x)["a"] - model.head.bias[[1, 0]])
    assert set(asked) == set(program.entries)


def test_replacements_come_before_the_conversion(program):
    seen = {}

    def look(name, tensor):
        seen[name] = tensor.dtype
        return tensor

    program.run(R(2, 3, 4, 4), replace_tensor=look, dtype=torch.float64)
    assert seen["head.weight"] is torch.float32
    assert seen["index"] is torch.int64


def test_values_can_be_observed(program):
    shapes = {}
    run_flat(
        program,
        [R(2, 3, 4, 4)],
        observe=lambda node, value: shapes.update({node.name: getattr(value, "shape", None)}),
    )
    calls = [n.name for n in program.nodes if n.op == "call_function"]
    assert list(shapes) == calls
    assert shapes["conv2d"] == (2, 4, 4, 4)


def test_gradients_flow_through_a_run(program, model):
    x = R(2, 3, 4, 4)
    program.run(x)["b"].sum().backward()
    assert model.conv.weight.grad is not None
    model.zero_grad()


def test_values_are_freed_after_their_last_use():
    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(20):
                x = torch.sin(x)
            return x

    import weakref

    program = capture(Chain(), (R(4),))
    alive = []

    def observe(node, value):
        alive.append(weakref.ref(value))
        assert sum(ref() is not None for ref in alive) <= 2

    with torch.no_grad():
        run_flat(program, [R(4)], observe=observe)


# -- copies ----------------------------------------------------------------------------------


def test_a_copy_is_independent(program):
    program.kept["head.weight"] = {1: torch.tensor([0])}
    program.history.append("record")
    copy = program.copy()
    assert copy.to_text() == program.to_text()
    assert copy.fingerprint() == program.fingerprint()
    assert not set(copy.nodes) & set(program.nodes)
    assert copy.tensor("head.weight") is program.tensor("head.weight")
    before = program.to_text()
    copy.kept["head.weight"][0] = torch.tensor([1])
    copy.history.append("another")
    with copy.edit(by="x") as edit:
        relu = next(n for n in copy.nodes if "relu" in n.name)
        edit.set_target(relu, torch.ops.aten.sigmoid.default)
        edit.set_tensor("head.bias", torch.zeros(2))
    assert program.to_text() == before
    assert program.tensor("head.bias").any()
    assert list(program.kept["head.weight"]) == [1]
    assert program.history == ["record"]
    x = R(2, 3, 4, 4)
    assert not torch.equal(program.run(x)["a"], copy.run(x)["a"])


def test_restore_takes_everything_over(program):
    other = capture(nn.Linear(3, 2), (R(4, 3),))
    version = program.version
    program.restore(other.copy())
    assert program.to_text() == other.to_text()
    assert program.version > version
    x = R(4, 3)
    assert torch.equal(program.run(x), other.run(x))
    assert program.model_name == "Linear"


# -- fingerprints ----------------------------------------------------------------------------


def test_fingerprints_see_every_change(program):
    prints = {program.fingerprint()}
    relu = next(n for n in program.nodes if "relu" in n.name)
    relu.target = torch.ops.aten.gelu.default
    prints.add(program.fingerprint())
    relu.kwargs = {"approximate": "tanh"}
    prints.add(program.fingerprint())
    with torch.no_grad():
        program.tensor("head.bias").add_(0)
    prints.add(program.fingerprint())
    assert len(prints) == 4
    assert program.fingerprint() in prints


# -- analyses --------------------------------------------------------------------------------

CALLS: list[int] = []


@dataclass(frozen=True)
class CountOps(Analysis[int]):
    name: ClassVar[str] = "count-ops"
    factor: int = 1

    def compute(self, program):
        CALLS.append(self.factor)
        return self.factor * sum(n.op == "call_function" for n in program.nodes)


def test_analyses_are_cached_by_their_options(program):
    CALLS.clear()
    count = program.analysis(CountOps)
    assert program.analysis(CountOps()) == count
    assert program.analysis(CountOps(factor=2)) == 2 * count
    assert CALLS == [1, 2]
    assert program.cached_analyses() == {CountOps(): count, CountOps(2): 2 * count}


def test_analyses_are_dropped_by_an_edit_unless_adopted(program):
    CALLS.clear()
    count = program.analysis(CountOps)
    valid = program.cached_analyses()
    with program.edit() as edit:
        relu = next(n for n in program.nodes if "relu" in n.name)
        edit.set_target(relu, torch.ops.aten.sigmoid.default)
    assert not program.cached_analyses()
    program.adopt_analyses(valid)
    assert program.analysis(CountOps) == count
    assert CALLS == [1]


def test_an_analysis_is_not_shared_with_a_copy(program):
    CALLS.clear()
    program.analysis(CountOps)
    program.copy().analysis(CountOps)
    assert CALLS == [1, 1]


def test_a_program_without_tensors_or_without_ops():
    class Plain(nn.Module):
        def forward(self, x):
            return F.relu(x)

    program = capture(Plain(), (R(3),))
    assert not program.entries
    assert program.cost().parameters == 0
    identity = capture(nn.Identity(), (x := R(3),))
    assert identity.run(x) is x
    assert identity.cost().flops == 0
    assert "outputs:\n  %input" in identity.to_text()


def test_an_analysis_is_computed_again_after_weights_were_written_in_place():
    computed = []

    @dataclass(frozen=True)
    class Norms(Analysis[float]):
        name = "norms"

        def compute(self, program):
            computed.append(program)
            return sum(float(p.detach().norm()) for p in program.parameters.values())

    program = capture(nn.Linear(3, 2), (torch.randn(1, 3),))
    before = program.analysis(Norms)
    assert program.analysis(Norms) == before
    assert len(computed) == 1
    with torch.no_grad():
        next(iter(program.parameters.values())).mul_(2)
    assert not program.cached_analyses()
    assert program.analysis(Norms) > before
    assert len(computed) == 2
