"""CompiledModel: names, ties, training, calling, moving and copying."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.backends.small_models import (
    GONE,
    KEPT,
    Perceptron,
    Tied,
    dynamic_perceptron,
    erase_by_hand,
    same_outputs,
    tied_inputs,
)
from torchlathe.backends import CompiledModel
from torchlathe.ir import (
    BackendError,
    InputError,
    TensorKind,
    UnsupportedError,
    capture,
)


@pytest.fixture
def tied() -> tuple[Tied, CompiledModel]:
    model = Tied().eval()
    ids, kwargs = tied_inputs()
    return model, CompiledModel(capture(model, (ids,), kwargs), source=model)


def test_the_state_dict_is_that_of_the_model(tied: tuple[Tied, CompiledModel]) -> None:
    model, compiled = tied
    expected, found = model.state_dict(), compiled.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert {n for n, _ in compiled.named_parameters()} == {n for n, _ in model.named_parameters()}
    buffers = {n for n, _ in compiled.named_buffers() if not n.startswith("_constants")}
    assert buffers == {n for n, _ in model.named_buffers()}


def test_ties_and_flags_are_kept(tied: tuple[Tied, CompiledModel]) -> None:
    _, compiled = tied
    named = dict(compiled.named_parameters(remove_duplicate=False))
    assert named["head.weight"] is named["embedding.weight"]
    assert named["again.0.weight"] is named["block.0.weight"]
    assert not named["frozen"].requires_grad
    assert named["block.2.bias"].requires_grad
    assert "shift" not in compiled.state_dict()


def test_outputs_have_the_structure_of_the_model(tied: tuple[Tied, CompiledModel]) -> None:
    model, compiled = tied
    ids, kwargs = tied_inputs()
    with torch.no_grad():
        expected, found = model(ids, **kwargs), compiled(ids, **kwargs)
    assert list(found) == list(expected)
    assert torch.equal(found["logits"], expected["logits"])
    assert isinstance(found["pooled"], tuple)
    assert torch.equal(found["pooled"][0], expected["pooled"][0])
    assert found["pooled"][1] is None
    assert found["size"] == 5


def test_nothing_is_shared_with_the_model(tied: tuple[Tied, CompiledModel]) -> None:
    model, compiled = tied
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    own |= {
        model.get_buffer("shift").untyped_storage().data_ptr(),
        model.plain.untyped_storage().data_ptr(),
    }
    for name, tensor in (*compiled.named_parameters(), *compiled.named_buffers()):
        assert tensor.untyped_storage().data_ptr() not in own, name


def test_what_a_pass_made_is_not_copied() -> None:
    model = Perceptron().eval()
    program = erase_by_hand(dynamic_perceptron(model))
    compiled = CompiledModel(program, source=model)
    assert compiled.get_parameter("fc1.weight") is program.entries["fc1.weight"].tensor
    assert compiled.get_parameter("fc2.bias") is not program.entries["fc2.bias"].tensor
    every = CompiledModel(program)
    assert (
        every.get_parameter("fc1.weight").data_ptr()
        != program.entries["fc1.weight"].tensor.data_ptr()
    )


def test_training_changes_the_compiled_model_only() -> None:
    model = Perceptron().eval()
    before = copy.deepcopy(model.state_dict())
    compiled = CompiledModel(dynamic_perceptron(model), source=model)
    compiled.train()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5)
    x, y = torch.randn(16, 4), torch.randn(16, 3)
    losses = []
    for _ in range(5):
        loss = nn.functional.mse_loss(compiled(x), y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(compiled.state_dict()[name], before[name])
    # What the program says is what the model has become.
    assert same_outputs(compiled.program.run, compiled, x)


def test_gradients_are_those_of_the_model(tied: tuple[Tied, CompiledModel]) -> None:
    model, compiled = tied
    ids, kwargs = tied_inputs()
    model(ids, **kwargs)["logits"].square().sum().backward()
    compiled(ids, **kwargs)["logits"].square().sum().backward()
    found = dict(compiled.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_training_makes_cached_analyses_stale() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), source=model)
    version = compiled.program.version
    assert compiled.program.version == version
    with torch.no_grad():
        compiled.get_parameter("fc1.weight").mul_(2)
    assert compiled.program.version > version


def test_batch_sizes_of_one_capture() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), source=model)
    for batch in (1, 2, 7):
        assert same_outputs(model, compiled, torch.randn(batch, 4))


def test_keywords_come_in_any_order() -> None:
    class Sub(nn.Module):
        def forward(self, *, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    a, b = torch.randn(3), torch.randn(3)
    compiled = CompiledModel(capture(Sub(), (), {"a": a, "b": b}))
    assert torch.equal(compiled(b=b, a=a), a - b)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        pytest.param(lambda x: (x.double(),), "expected torch.float32", id="dtype"),
        pytest.param(lambda x: (x[0],), "expected 2 dimensions", id="rank"),
        pytest.param(lambda x: (x[:, :3],), "dimension 1 is static", id="extent"),
        pytest.param(lambda x: (x, x), "captured with", id="structure"),
        pytest.param(lambda x: (x.tolist(),), "captured with", id="no-tensor"),
        pytest.param(lambda x: (None,), "expected a tensor", id="none"),
    ],
)
def test_inputs_that_do_not_fit(bad, text: str) -> None:
    compiled = CompiledModel(dynamic_perceptron(Perceptron()))
    with pytest.raises(InputError, match=text):
        compiled(*bad(torch.randn(2, 4)))


def test_symbols_and_ranges_are_checked() -> None:
    class Add(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    rows = torch.export.Dim("rows", min=2, max=5)
    program = capture(
        Add(), (torch.randn(3, 2), torch.randn(3, 2)), dynamic_shapes=({0: rows}, {0: rows})
    )
    compiled = CompiledModel(program)
    assert compiled(torch.zeros(5, 2), torch.ones(5, 2)).sum() == 10
    with pytest.raises(InputError, match="elsewhere"):
        compiled(torch.zeros(5, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match=r"\[2, 5\]"):
        compiled(torch.zeros(6, 2), torch.zeros(6, 2))


def test_sizes_that_follow_from_others_are_checked() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(2, -1)

    half = torch.export.Dim("half", min=2, max=64)
    compiled = CompiledModel(capture(Double(), (torch.randn(6),), dynamic_shapes=({0: 2 * half},)))
    assert compiled(torch.randn(8)).shape == (2, 4)


def test_a_constant_argument_must_stay() -> None:
    class Flag(nn.Module):
        def forward(self, x: torch.Tensor, double: bool) -> torch.Tensor:
            return 2 * x if double else x

    x = torch.randn(3)
    compiled = CompiledModel(capture(Flag(), (x, True)))
    assert torch.equal(compiled(x, True), 2 * x)
    with pytest.raises(InputError, match="captured with the constant True"):
        compiled(x, False)


def test_names_that_meet_those_of_the_class() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = nn.Linear(3, 3)
            self.kept = nn.Parameter(torch.randn(3))
            self.tensors = nn.ModuleDict({"a-b": nn.Linear(3, 3), "1 x": nn.Linear(3, 3)})
            self.register_buffer("_constants", torch.randn(3))
            self.graph = nn.Linear(3, 3)
            self.held = torch.ones(3)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            x = self.tensors["1 x"](self.tensors["a-b"](input)) + self._constants
            return self.graph(self.program(x) * self.kept) + self.held

    model = Awkward().eval()
    x = torch.randn(2, 3)
    compiled = CompiledModel(capture(model, (x,)), source=model)
    assert set(compiled.state_dict()) == set(model.state_dict())
    assert same_outputs(model, compiled, x)
    assert compiled.program.model_name == "Awkward"
    inner = compiled.__dict__["_torchlathe"]
    from torchlathe.backends import Lowerable

    module = Lowerable(inner.program, inner.tensors, inner.paths).graph_module()
    with torch.no_grad():
        assert torch.equal(module(x)[0], model(x))


def test_a_clash_of_names_is_an_error() -> None:
    program = dynamic_perceptron(Perceptron())
    with program.edit() as edit:
        weight = program.tensor_nodes["fc1.weight"]
        node = edit.add_tensor("fc1.weight.scale", torch.ones(8, 1), TensorKind.BUFFER)
        users = list(weight.users)
        scaled = edit.call(
            torch.ops.aten.mul.Tensor, (weight, node), like=users[0], before=users[0]
        )
        edit.replace(weight, scaled)
    with pytest.raises(BackendError, match="clashes"):
        CompiledModel(program)


def test_dropout_and_batch_norm_stay_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9)).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = CompiledModel(capture(model, (x,)), source=model)
    assert not compiled.training
    compiled.train()
    assert same_outputs(model, compiled, x)
    assert int(compiled.state_dict()["1.num_batches_tracked"]) == 0


def test_a_loaded_state_dict_is_used() -> None:
    model, other = Perceptron().eval(), Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), source=model)
    x = torch.randn(3, 4)
    for assign in (False, True):
        compiled.load_state_dict(other.state_dict(), assign=assign)
        assert same_outputs(other, compiled, x)
        assert same_outputs(compiled.program.run, compiled, x)
        other = Perceptron().eval()


def test_functional_call_replaces_tensors() -> None:
    model, other = Perceptron().eval(), Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), source=model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        found = torch.func.functional_call(compiled, dict(other.named_parameters()), (x,))
        assert torch.equal(found, other(x))
    assert same_outputs(model, compiled, x)


def test_a_parametrization_is_used() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(dynamic_perceptron(model), source=model)

    class Twice(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    nn.utils.parametrize.register_parametrization(compiled.get_submodule("fc2"), "weight", Twice())
    with torch.no_grad():
        model.fc2.weight.mul_(2)
    assert same_outputs(model, compiled, torch.randn(3, 4))


def test_a_copy_is_independent(tied: tuple[Tied, CompiledModel]) -> None:
    _, compiled = tied
    ids, kwargs = tied_inputs()
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        before = compiled(ids, **kwargs)["logits"]
        twin.get_parameter("embedding.weight").zero_()
        assert torch.equal(compiled(ids, **kwargs)["logits"], before)
        assert not torch.equal(twin(ids, **kwargs)["logits"], before)
    assert twin.get_parameter("head.weight") is twin.get_parameter("embedding.weight")


def test_pickling_is_refused_with_a_way_out() -> None:
    compiled = CompiledModel(dynamic_perceptron(Perceptron()))
    with pytest.raises(UnsupportedError, match="save"):
        torch.save(compiled, io.BytesIO())
    torch.save(compiled.state_dict(), io.BytesIO())


def test_another_dtype_takes_the_graph_along(tied: tuple[Tied, CompiledModel]) -> None:
    model, compiled = tied
    ids, kwargs = tied_inputs()
    compiled.double()
    wide = {"mask": kwargs["mask"].double()}
    with torch.no_grad():
        found = compiled(ids, **wide)["logits"]
        expected = model(ids, **kwargs)["logits"]
    assert found.dtype is torch.float64
    assert torch.allclose(found.float(), expected, atol=1e-5)
    assert compiled.get_parameter("head.weight") is compiled.get_parameter("embedding.weight")
    assert compiled.program.tensor("scale").dtype is torch.float64
    with pytest.raises(InputError, match="float64"):
        compiled(ids, **kwargs)


def test_casts_in_the_code_follow() -> None:
    class Upcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = torch.arange(x.shape[0], device=x.device, dtype=torch.float32)
            return self.fc(x.to(torch.float32) + rows[:, None] + torch.eye(2, 4))

    compiled = CompiledModel(capture(Upcast(), (torch.randn(2, 4),))).to(torch.bfloat16)
    assert compiled(torch.randn(2, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_a_dtype_that_the_graph_cannot_follow_changes_nothing() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(self.fc(x).view(-1, 2, 2))
            return torch.view_as_real(pairs * pairs)

    compiled = CompiledModel(capture(Fixed(), (torch.randn(4, 4),)))
    x = torch.randn(4, 4)
    with torch.no_grad():
        before = compiled(x)
        with pytest.raises(UnsupportedError, match="bfloat16") as caught:
            compiled.bfloat16()
        assert "convert the model first" in str(caught.value)
        assert torch.equal(compiled(x), before)
    assert compiled.get_parameter("fc.weight").dtype is torch.float32


def test_a_compiled_model_can_be_captured_again() -> None:
    model = Perceptron().eval()
    compiled = CompiledModel(erase_by_hand(dynamic_perceptron(model)), source=model)
    program = dynamic_perceptron(compiled)
    assert set(program.entries) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert same_outputs(CompiledModel(program), compiled, torch.randn(5, 4))


def test_an_exported_program_is_a_source() -> None:
    model = Perceptron().eval()
    exported = torch.export.export(model, (torch.randn(2, 4),))
    compiled = CompiledModel(capture(exported), source=exported)
    with torch.no_grad():
        compiled.get_parameter("fc1.weight").zero_()
    assert model.fc1.weight.abs().sum() > 0
    assert set(compiled.state_dict()) == set(model.state_dict())


def test_a_program_without_values_cannot_run() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = Perceptron()
        program = capture(model, (torch.randn(2, 4),))
    with pytest.raises(BackendError, match="no values"):
        CompiledModel(program, source=model)


def test_strange_constants_do_not_disturb() -> None:
    """Channels-last weights keep their layout, expanded buffers get memory of their own."""

    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.register_buffer("row", torch.randn(1).expand(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.get_buffer("row").view(4, 1, 1)

    model = Layouts().eval()
    x = torch.randn(2, 4, 6, 6)
    compiled = CompiledModel(capture(model, (x,)), source=model)
    assert compiled.get_parameter("conv.weight").is_contiguous(memory_format=torch.channels_last)
    assert same_outputs(model, compiled, x)


# -- what was erased ------------------------------------------------------------------------------


@pytest.fixture
def erased() -> tuple[Perceptron, CompiledModel]:
    model = Perceptron().eval()
    return model, CompiledModel(erase_by_hand(dynamic_perceptron(model)), source=model)


def test_kept_says_which_indices_stayed(erased: tuple[Perceptron, CompiledModel]) -> None:
    model, compiled = erased
    assert set(compiled.kept) == {"fc1.weight", "fc1.bias", "fc2.weight"}
    for name, parameter in compiled.named_parameters():
        part: torch.Tensor = model.get_parameter(name)
        for axis in range(parameter.dim()):
            part = part.index_select(axis, compiled.kept_indices(name, axis))
        assert torch.equal(part, parameter)
    assert torch.equal(compiled.kept_indices("fc2.weight", -1), KEPT)
    with pytest.raises(InputError, match="no tensor"):
        compiled.kept_indices("fc3.weight", 0)
    with pytest.raises(InputError, match="no axis 2"):
        compiled.kept_indices("fc2.weight", 2)


def test_the_zeroed_twin_equals_the_erased_model(erased: tuple[Perceptron, CompiledModel]) -> None:
    model, compiled = erased
    before = copy.deepcopy(model.state_dict())
    twin = compiled.zeroed_reference(model)
    x = torch.randn(9, 4)
    with torch.no_grad():
        assert torch.allclose(twin(x), compiled(x), atol=1e-6)
        assert not torch.allclose(model(x), compiled(x), atol=1e-3)
    assert isinstance(twin, Perceptron)
    assert twin.fc1.weight[GONE].abs().sum() == 0
    assert torch.equal(twin.fc1.weight[KEPT], model.fc1.weight[KEPT])
    assert torch.equal(twin.fc2.weight, model.fc2.weight)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_zeroed_twin_keeps_ties() -> None:
    class TwoNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Perceptron()
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(x)

    model = TwoNames().eval()
    program = dynamic_perceptron(model)
    prefix = next(iter(program.entries)).split(".")[0]
    with program.edit() as edit:
        for name in ("fc1.weight", "fc1.bias"):
            edit.record_zeroed(f"{prefix}.{name}", 0, GONE)
            edit.keep(f"{prefix}.{name}", {0: KEPT})
        edit.keep(f"{prefix}.fc2.weight", {1: KEPT})
    compiled = CompiledModel(program, source=model)
    assert {"first.fc1.weight", "second.fc1.weight"} <= set(compiled.kept)
    twin = compiled.zeroed_reference(model)
    assert twin.get_parameter("first.fc1.weight") is twin.get_parameter("second.fc1.weight")
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.allclose(twin(x), compiled(x), atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        pytest.param(lambda: Perceptron(5), r"has shape \(5, 4\)", id="smaller"),
        pytest.param(lambda: Perceptron(9), r"has shape \(9, 4\)", id="larger"),
        pytest.param(lambda: nn.Linear(2, 2), "no tensor 'fc1.weight'", id="another"),
    ],
)
def test_the_zeroed_twin_needs_the_original(erased, wrong, text: str) -> None:
    _, compiled = erased
    with pytest.raises(InputError, match=text):
        compiled.zeroed_reference(wrong())
    with pytest.raises(InputError, match="has shape"):
        compiled.zeroed_reference(compiled)


def test_the_text_form_says_what_it_is(erased: tuple[Perceptron, CompiledModel]) -> None:
    text = repr(erased[1])
    assert "Perceptron, backend='eager'" in text
    assert "3 tensors erased in part" in text
    assert "args[0] float32[s0, 4]" in text
