"""Capture: what comes out equals the model, and the model is as it was before."""

import copy
import dataclasses
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.utils import _pytree as pytree

from torchlathe.ir import CaptureError, TensorKind, capture, from_exported, module_path, source_line

R = torch.randn


def same(a, b):
    """Equal structures, and equal tensors in them."""
    leaves, spec = pytree.tree_flatten(a)
    others, other_spec = pytree.tree_flatten(b)
    assert spec == other_spec
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        else:
            assert x == y
    return True


class Net(nn.Module):
    """A bit of everything: norm, dropout, hooks, buffers of each kind, a frozen part."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("shift", torch.arange(3.0))
        self.register_buffer("temporary", torch.ones(3), persistent=False)
        self.register_buffer("unread", torch.zeros(2, dtype=torch.long))

    def forward(self, x):
        x = self.head(self.inner(x)) + self.shift * self.temporary
        return self.frozen(x) * torch.tensor([1.0, 2.0, 3.0])


# -- the model stays as it was ---------------------------------------------------------------


def test_the_model_is_unchanged():
    model = Net().train()
    model.inner[1].eval()
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    training = {name: m.training for name, m in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: t.detach().clone() for name, t in tensors.items()}
    versions = {name: t._version for name, t in tensors.items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    hooks = dict(model.head._forward_hooks)

    capture(model, (R(5, 4),), dynamic_shapes="auto")

    assert {name: m.training for name, m in model.named_modules()} == training
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == tensors.keys()
    for name, tensor in after.items():
        assert tensor is tensors[name]
        assert type(tensor) is type(tensors[name])
        assert tensor._version == versions[name]
        assert torch.equal(tensor, values[name])
    assert model.head.weight.grad is not None
    assert model.inner[0].weight.grad is None
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert model.head._forward_hooks == hooks
    handle.remove()


def test_random_states_are_unchanged():
    model = Net()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    capture(model, (torch.ones(5, 4),))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_grad_mode_and_default_dtype_are_unchanged():
    with torch.no_grad():
        capture(Net(), (R(5, 4),))
        assert not torch.is_grad_enabled()
    capture(Net(), (R(5, 4),))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32


def test_a_failing_capture_leaves_the_model_as_it_was():
    class Fails(Net):
        def forward(self, x):
            if x.sum() > 0:
                return super().forward(x)
            return x

    model = Fails().train()
    values = copy.deepcopy(model.state_dict())
    with pytest.raises(CaptureError):
        capture(model, (torch.ones(5, 4),))
    assert all(m.training for m in model.modules())
    assert same(dict(model.state_dict()), dict(values))


def test_it_is_captured_in_eval_mode():
    model = Net().train()
    x = R(5, 4)
    program = capture(model, (x,))
    assert same(program.run(x), model.eval()(x))


def test_tensors_are_shared_with_the_model_not_copied():
    model = Net()
    program = capture(model, (R(5, 4),))
    assert program.tensor("head.weight") is model.head.weight
    assert program.tensor("inner.1.running_mean") is model.inner[1].running_mean


def test_the_example_inputs_are_not_written_to():
    class Writes(nn.Module):
        def forward(self, x):
            return F.relu(x.clone(), inplace=True)

    x = R(3)
    before = x.clone()
    capture(Writes(), (x,))
    assert torch.equal(x, before)


def test_capturing_twice_gives_the_same_program():
    model = Net()
    first, second = (capture(model, (R(5, 4),), dynamic_shapes="auto") for _ in range(2))
    assert first.to_text() == second.to_text()


def test_capture_inside_of_inference_mode():
    model = Net().eval()
    x = R(5, 4)
    with torch.inference_mode():
        program = capture(model, (x,))
        assert same(program.run(x), model(x))


# -- tensors ---------------------------------------------------------------------------------


def test_names_kinds_and_persistence():
    program = capture(Net(), (R(5, 4),))
    entries = program.entries
    assert set(program.parameters) == {
        *("inner.0.weight", "inner.0.bias", "inner.1.weight", "inner.1.bias"),
        *("head.weight", "head.bias", "frozen.weight", "frozen.bias"),
    }
    assert entries["shift"].kind is TensorKind.BUFFER
    assert entries["shift"].persistent
    assert entries["temporary"].kind is TensorKind.BUFFER
    assert not entries["temporary"].persistent
    (constant,) = [e for e in entries.values() if e.kind is TensorKind.CONSTANT]
    assert not constant.persistent
    assert constant.tensor.tolist() == [1, 2, 3]
    # Read by nothing, but part of the state dict.
    assert set(program.carried) == {"unread", "inner.1.num_batches_tracked"}
    assert not program.parameters["frozen.weight"].requires_grad


def test_parameters_that_nothing_reads_are_listed():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.spare = nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    program = capture(Spare(), (R(2, 4),))
    assert set(program.entries) == {"used.weight", "used.bias"}
    assert set(program.dropped) == {"spare.weight", "spare.bias"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("one", torch.ones(4))
        self.register_buffer("uno", self.one)

    def forward(self, ids):
        return self.head(self.again(self.first(self.embed(ids))) * self.one + self.uno)


def test_tied_tensors_stay_tied():
    model = Tied()
    program = capture(model, (torch.tensor([1, 2]),))
    assert program.aliases == {
        "head.weight": "embed.weight",
        "again.weight": "first.weight",
        "again.bias": "first.bias",
        "uno": "one",
    }
    assert program.tensor("head.weight") is model.embed.weight
    assert program.tensor("uno") is model.one
    assert set(program.entries) == {"embed.weight", "first.weight", "first.bias", "one"}
    assert set(program.tensor_nodes) == set(program.entries)
    ids = torch.tensor([3, 4])
    assert same(program.run(ids), model(ids))


def test_equal_but_separate_tensors_are_not_tied():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))
            self.b = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.a + self.b

    program = capture(Twins(), (R(3),))
    assert set(program.entries) == {"a", "b"}
    assert not program.aliases


# -- inputs and outputs ----------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: object = None


@dataclasses.dataclass
class Result:
    value: torch.Tensor
    rest: object


pytree.register_dataclass(Batch)
pytree.register_dataclass(Result)


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, batch, extra=None, *, table, flag=True, names=("a", "b")):
        y = self.linear(batch.x)
        if extra is not None:
            y = y + extra
        if flag:
            y = y * table["scale"][0]
        return Result(y, {names[0]: (y.sum(0), None), names[1]: [3, "text", y]})


@pytest.mark.parametrize("extra", [None, torch.ones(4)], ids=["none", "tensor"])
@pytest.mark.parametrize("flag", [True, False])
def test_structures_come_back_as_they_were(extra, flag):
    model = Structured().eval()
    kwargs = {"table": {"scale": [torch.tensor(2.0), torch.tensor(9.0)]}, "flag": flag}
    program = capture(model, (Batch(R(2, 4)), extra), kwargs)
    batch = Batch(R(2, 4))
    result = program.run(batch, extra, **kwargs)
    assert type(result) is Result
    assert same(result, model(batch, extra, **kwargs))


def test_keywords_come_in_any_order():
    class Difference(nn.Module):
        def forward(self, a, b):
            return a - b

    a, b = R(3), R(3)
    program = capture(Difference(), (), {"b": b, "a": a})
    assert same(program.run(a=a, b=b), a - b)
    assert same(program.run(b=b, a=a), a - b)
    assert same(capture(Difference(), {"a": a, "b": b}).run(b=b, a=a), a - b)


def test_one_tensor_is_one_argument():
    x = R(5, 4)
    model = Net().eval()
    assert same(capture(model, x).run(x), model(x))


def test_inputs_and_parameters_that_are_returned_as_they_are():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(R(3))

        def forward(self, x, unused):
            y = x + 1
            return x, self.w, y, y

    model = Returns()
    x = R(3)
    program = capture(model, (x, R(2)))
    assert len(program.input_nodes) == 2
    assert same(program.run(x, R(2)), model(x, None))


# -- dynamic shapes --------------------------------------------------------------------------


def test_two_batch_sizes_and_lengths_from_one_capture():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.qkv = nn.Linear(8, 24)

        def forward(self, ids):
            x = self.embed(ids)
            n, t = ids.shape
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            parts = self.qkv(x).chunk(3, dim=-1)
            q, k, v = (part.view(n, t, 2, 4).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, mask)
            return y.transpose(1, 2).flatten(2)

    model = Text().eval()
    dims = {"ids": {0: Dim("batch"), 1: Dim("length")}}
    program = capture(model, (torch.ones(3, 5, dtype=torch.long),), dynamic_shapes=dims)
    for shape in ((3, 5), (2, 7), (1, 4)):
        ids = torch.randint(0, 10, shape)
        torch.testing.assert_close(program.run(ids), model(ids))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_auto_marks_the_batch(batch):
    model = Net().eval()
    program = capture(model, (R(batch, 4),), dynamic_shapes="auto")
    for size in (1, 2, 7):
        x = R(size, 4)
        torch.testing.assert_close(program.run(x), model(x))


def test_auto_with_arguments_and_keywords_in_another_order():
    class Three(nn.Module):
        def forward(self, x, mask, table=None, scale=1.0):
            return x * mask.unsqueeze(1) @ table * scale

    model = Three()
    program = capture(
        model,
        (R(3, 4),),
        {"scale": 2.0, "table": R(4, 5), "mask": torch.ones(3)},
        dynamic_shapes="auto",
    )
    x, table, mask = R(6, 4), R(4, 5), R(6)
    assert same(program.run(x, mask=mask, table=table, scale=2.0), model(x, mask, table, scale=2.0))


def test_auto_with_a_variable_number_of_arguments():
    class Sums(nn.Module):
        def forward(self, *parts, scale=1.0, **unused):
            return sum(parts) * scale

    model = Sums()
    program = capture(model, (R(2, 3), R(2, 3)), {"scale": 2.0}, dynamic_shapes="auto")
    a, b = R(5, 3), R(5, 3)
    assert same(program.run(a, b, scale=2.0), model(a, b, scale=2.0))


def test_auto_leaves_a_batch_static_that_the_model_fixes():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(R(3, 4))

        def forward(self, x):
            return x + self.w

    program = capture(Fixed(), (R(3, 4),), dynamic_shapes="auto")
    assert program.input_nodes[0].meta["val"].shape == (3, 4)


def test_non_strict_failure_is_tried_again_strictly():
    class Careful(nn.Module):
        """Only the tracer of strict export takes a symbolic size for an int."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            if not isinstance(x.shape[0], int):
                raise TypeError("sizes must be integers")
            return self.linear(x).view(x.shape[0], 3)

    model = Careful().eval()
    with pytest.raises(TypeError, match="must be integers"):
        torch.export.export(model, (R(4, 3),), dynamic_shapes=({0: Dim("n")},), strict=False)
    program = capture(model, (R(4, 3),), dynamic_shapes=({0: Dim("n")},))
    assert set(program.entries) == {"linear.weight", "linear.bias"}
    assert program.tensor("linear.weight") is model.linear.weight
    x = R(6, 3)
    torch.testing.assert_close(program.run(x), model(x))


# -- exported programs -----------------------------------------------------------------------


def test_an_exported_program():
    model = Net().eval()
    x = R(5, 4)
    exported = torch.export.export(model, (x,))
    for program in (capture(exported), from_exported(exported), capture(exported, (R(5, 4),))):
        assert same(program.run(x), model(x))
    assert program.model_name == "ExportedProgram"
    assert same(exported.module()(x), model(x))


def test_input_names_that_python_knows():
    class Names(nn.Module):
        def forward(self, input, sum, x_1, lambda_):
            return input + sum * x_1 - lambda_

    inputs = (R(3), R(3), R(3), R(3))
    program = capture(Names(), inputs)
    assert [n.name for n in program.input_nodes] == ["input", "sum", "x_1", "lambda_"]
    assert program.copy().to_text() == program.to_text()
    assert same(program.copy().run(*inputs), Names()(*inputs))


def test_a_saved_exported_program(tmp_path):
    model = Tied().eval()
    ids = torch.tensor([1, 2])
    torch.export.save(torch.export.export(model, (ids,)), tmp_path / "model.pt2")
    program = capture(torch.export.load(tmp_path / "model.pt2"))
    assert same(program.run(ids), model(ids))
    assert "embed.weight" in program.parameters


# -- provenance ------------------------------------------------------------------------------


def test_nodes_know_their_module_and_line():
    program = capture(Net(), (R(5, 4),))
    nodes = {str(n.target): n for n in program.nodes if n.op == "call_function"}
    assert module_path(nodes["aten.batch_norm.default"]) == "inner.1"
    assert module_path(nodes["aten.mul.Tensor"]) == ""
    line = source_line(nodes["aten.mul.Tensor"])
    assert line is not None
    assert "test_capture.py" in line
    assert line.endswith("(forward)")


# -- fake tensors ----------------------------------------------------------------------------


class Wide(nn.Module):
    """Some 69 billion parameters."""

    def __init__(self, width=65536):
        super().__init__()
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
        self.layers = nn.Sequential(*layers * 2, nn.Linear(width, 4 * width))
        self.register_buffer("table", torch.ones(width))

    def forward(self, x):
        return self.layers(x * self.table)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dynamic", [None, "auto"])
def test_capture_of_a_fake_model_takes_no_memory(inside, dynamic):
    mode = FakeTensorMode()
    with mode:
        model = Wide()
        x = torch.ones(2, 65536)
        if inside:
            program = capture(model, (x,), dynamic_shapes=dynamic)
    if not inside:
        program = capture(model, (x,), dynamic_shapes=dynamic)
    assert all(isinstance(e.tensor, FakeTensor) for e in program.entries.values())
    cost = program.cost()
    assert cost.parameters > 25e9
    assert cost.flops_at() > 2 * 2 * 25e9
    with program.edit() as edit:
        edit.keep("layers.0.weight", {0: torch.arange(100)})
        edit.keep("layers.0.bias", {0: torch.arange(100)})
        edit.keep("layers.2.weight", {1: torch.arange(100)})
    assert program.tensor("layers.0.weight").shape == (100, 65536)
    assert "f32[100, 65536]" in program.to_text()
    assert program.cost().parameters < cost.parameters


def test_capture_of_a_fake_model_with_real_inputs():
    with FakeTensorMode():
        model = Net()
    program = capture(model, (R(5, 4),))
    assert program.cost().parameters == sum(p.numel() for p in model.parameters())


def test_capture_on_the_meta_device():
    with torch.device("meta"):
        model = Wide()
    program = capture(model, (torch.empty(3, 65536, device="meta"),), dynamic_shapes="auto")
    assert program.tensor("layers.0.weight").is_meta
    assert program.cost().flops_at({"s0": 1}) * 5 == program.cost().flops_at({"s0": 5})


# -- third-party containers ------------------------------------------------------------------


def test_a_language_model_with_its_cache():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    program = capture(model, (torch.ones(2, 6, dtype=torch.long),), dynamic_shapes="auto")
    ids = torch.randint(0, 50, (3, 6))
    result, expected = program.run(ids), model(ids)
    assert type(result) is type(expected)
    torch.testing.assert_close(result.logits, expected.logits)
    assert type(result.past_key_values) is transformers.DynamicCache
    for layer, want in zip(
        result.past_key_values.layers, expected.past_key_values.layers, strict=True
    ):
        torch.testing.assert_close(layer.keys, want.keys)
        torch.testing.assert_close(layer.values, want.values)


def test_recurrent_layers_keep_their_parameters():
    model = nn.LSTM(5, 6, 2, batch_first=True).eval()
    x = R(2, 3, 5)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = capture(model, (x,))
    assert set(program.entries) == {name for name, _ in model.named_parameters()}
    assert same(model(x), before)
    assert same(program.run(x), before)
    assert all(type(w) is nn.Parameter for w in model._flat_weights)
