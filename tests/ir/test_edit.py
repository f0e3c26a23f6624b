"""Edits keep the graph, its metadata, the tensors and the provenance together."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.backends import CompiledModel
from torchlathe.ir import TensorKind, VerifyError, capture, info, module_path, source_line
from torchlathe.ir.fakes import fake_run, same_value

R = torch.randn
aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.down = nn.Linear(8, 3)
        self.tied = nn.Linear(4, 8, bias=False)
        self.tied.weight = self.up.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("unread", torch.ones(3))

    def forward(self, x):
        y = torch.relu(self.norm(self.up(x) + self.tied(x)))
        return self.down(y) * self.scale


@pytest.fixture
def program():
    return capture(Net(), (R(2, 4),), dynamic_shapes="auto")


def node_of(program, target):
    return next(n for n in program.nodes if n.target is target)


def snapshot(program):
    """All that a user can see of a program."""
    return (
        program.to_text(),
        {name: id(e.tensor) for name, e in program.entries.items()},
        {name: e.tensor.clone() for name, e in program.entries.items()},
        {name: {a: i.tolist() for a, i in axes.items()} for name, axes in program.kept.items()},
        {name: {a: i.tolist() for a, i in axes.items()} for name, axes in program.zeroed.items()},
        dict(program.aliases),
        dict(program.carried),
        program.dropped,
        list(program.history),
        {n.name: str(n.meta.get("val")) for n in program.nodes},
        {n.name: (info(n), module_path(n), source_line(n)) for n in program.nodes},
    )


def assert_same(a, b):
    for before, after in zip(a, b, strict=True):
        if isinstance(before, dict) and any(isinstance(v, torch.Tensor) for v in before.values()):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[k], after[k]) for k in before)
        else:
            assert before == after


def keep_hidden(edit, indices):
    edit.keep("up.weight", {0: indices})
    for name in ("up.bias", "norm.weight", "norm.bias"):
        edit.keep(name, {0: indices})
    edit.keep("down.weight", {1: indices})
    norm = node_of(edit.program, aten.layer_norm.default)
    edit.set_args(norm, (norm.args[0], [len(indices)], *norm.args[2:]))


# -- metadata --------------------------------------------------------------------------------


def test_metadata_is_recomputed_downstream_only(program):
    values = {n.name: n.meta["val"] for n in program.nodes if "val" in n.meta}
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([0, 2, 5]))
    assert "f32[s0, 3]" in program.to_text()
    for node in program.nodes:
        if node.op == "call_function":
            assert same_value(node.meta["val"], fake_run(node, program.fake_mode))
    relu = node_of(program, aten.relu.default).meta["val"]
    assert relu.shape[1] == 3
    # What has the shape that it had keeps its metadata.
    down = next(n for n in program.nodes if n.name == "linear_2")
    assert down.meta["val"] is values["linear_2"]
    x = R(5, 4)
    assert program.run(x).shape == (5, 3)


def test_the_batch_stays_symbolic(program):
    before = program.input_nodes[0].meta["val"].shape[0]
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([1, 2]))
    relu = node_of(program, aten.relu.default).meta["val"]
    assert relu.shape[0].node.expr == before.node.expr
    assert not program.fake_mode.shape_env.guards


def test_a_dtype_change_flows_down(program):
    with program.edit() as edit:
        for name in ("down.weight", "down.bias"):
            edit.set_tensor(name, program.tensor(name).double())
        relu = node_of(program, aten.relu.default)
        users = list(relu.users)
        cast = edit.call(aten.to.dtype, (relu, torch.float64), like=relu)
        edit.replace(relu, cast, users=users)
    mul = node_of(program, aten.mul.Tensor)
    assert mul.meta["val"].dtype is torch.float64
    assert program.run(R(3, 4)).dtype is torch.float64


def test_an_edit_that_fits_nowhere_is_an_error_with_its_place(program):
    with pytest.raises(VerifyError) as caught, program.edit() as edit:
        edit.keep("up.weight", {1: torch.tensor([0, 1])})
    assert "aten.linear.default does not accept its inputs" in caught.value.message
    assert "%p_up_weight: (8, 2)" in caught.value.message
    assert "in up" in caught.value.where
    assert "test_edit.py" in caught.value.where


# -- rollback --------------------------------------------------------------------------------


class Boom(Exception):
    pass


def change_everything(program, failure=None):
    with program.edit(by="test") as edit:
        relu = node_of(program, aten.relu.default)
        gelu = edit.call(aten.gelu.default, relu.args, like=relu)
        edit.replace(relu, gelu)
        keep_hidden(edit, torch.tensor([0, 1]))
        edit.record_zeroed("up.weight", 0, torch.tensor([1]))
        mul = node_of(program, aten.mul.Tensor)
        extra = edit.add_tensor("extra", torch.ones(3))
        edit.replace(mul, edit.call(aten.add.Tensor, (mul, extra), like=mul))
        program.history.append("something")
        if failure is not None:
            failure(edit)


def explode(edit):
    raise Boom


def interrupt(edit):
    raise KeyboardInterrupt


def fit_nowhere(edit):
    edit.keep("down.weight", {1: torch.tensor([0])})


FAILURES = [(explode, Boom), (interrupt, KeyboardInterrupt), (fit_nowhere, VerifyError)]


@pytest.mark.parametrize(("failure", "error"), FAILURES, ids=lambda f: f.__name__)
def test_a_failure_rolls_back(program, failure, error):
    before = snapshot(program)
    x = R(3, 4)
    expected = program.run(x)
    with pytest.raises(error):
        change_everything(program, failure)
    assert_same(before, snapshot(program))
    assert torch.equal(program.run(x), expected)
    # And nothing is left that would be in the way of another try.
    change_everything(program)
    assert "gelu" in program.to_text()


def test_rollback_after_an_earlier_edit(program):
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([0, 3, 5, 7]))
        edit.record_zeroed("up.weight", 1, torch.tensor([2]))
    before = snapshot(program)
    with pytest.raises(Boom):
        change_everything(program, explode)
    assert_same(before, snapshot(program))


def test_cached_analyses_do_not_outlive_a_rollback(program):
    nodes = set(program.nodes)
    program.cost()
    with pytest.raises(Boom), program.edit():
        raise Boom
    assert not program.cached_analyses()
    assert not nodes & set(program.nodes)


def test_the_models_tensors_are_not_written_to():
    model = Net()
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = capture(model, (R(2, 4),))
    change_everything(program)
    for name, p in model.named_parameters():
        assert torch.equal(p, values[name])


# -- versions --------------------------------------------------------------------------------


def test_an_edit_without_changes_changes_nothing(program):
    cost, version, before = program.cost(), program.version, program.fingerprint()
    with program.edit() as edit:
        relu = node_of(program, aten.relu.default)
        edit.set_args(relu, relu.args)
        assert edit.count == 0
    assert program.version == version
    assert program.fingerprint() == before
    assert program.cost() is cost


def test_a_change_makes_a_new_version(program):
    version, before = program.version, program.fingerprint()
    with program.edit() as edit:
        edit.set_target(node_of(program, aten.relu.default), aten.sigmoid.default)
        assert edit.count == 1
    assert program.version > version
    assert program.fingerprint() != before
    assert not program.cached_analyses()


def test_one_edit_at_a_time(program):
    with pytest.raises(AssertionError, match="one edit at a time"), program.edit(), program.edit():
        pass
    with program.edit():
        pass


# -- provenance ------------------------------------------------------------------------------


def test_new_nodes_know_where_they_come_from(program):
    relu = node_of(program, aten.relu.default)
    linear = next(n for n in program.nodes if n.target is aten.linear.default)
    with program.edit(by="swap{to=gelu}") as edit:
        gelu = edit.call(aten.gelu.default, relu.args, like=relu)
        edit.replace(relu, gelu)
        scale = edit.add_tensor("new.scale", torch.ones(8), TensorKind.PARAMETER)
        edit.replace(linear, edit.call(aten.mul.Tensor, (linear, scale), like=linear))
    gelu = node_of(program, aten.gelu.default)
    assert info(gelu).created_by == "swap{to=gelu}"
    assert source_line(gelu) is not None
    mul = next(n for n in program.nodes if n.target is aten.mul.Tensor)
    assert module_path(mul) == "up"
    assert info(program.tensor_nodes["new.scale"]).created_by == "swap{to=gelu}"
    assert info(node_of(program, aten.layer_norm.default)).created_by is None


def test_replace_leaves_the_new_nodes_own_use(program):
    relu = node_of(program, aten.relu.default)
    with program.edit() as edit:
        twice = edit.call(aten.mul.Tensor, (relu, 2), like=relu)
        edit.replace(relu, twice)
    assert list(relu.users) == [twice]
    x = R(3, 4)
    assert program.run(x).shape == (3, 3)


def test_functions_of_python_can_be_called(program):
    down = next(n for n in program.nodes if n.target is aten.mul.Tensor)
    with program.edit() as edit:
        parts = edit.call(aten.split.Tensor, (down, 2, 1), like=down)
        first = edit.call(operator.getitem, (parts, 0), like=parts)
        output = program.output_node
        edit.replace(down, first, users=[output])
    assert program.run(R(3, 4)).shape == (3, 2)


# -- tensors ---------------------------------------------------------------------------------


def test_keep_composes_original_indices_over_edits(program):
    original = program.tensor("up.weight").detach().clone()
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([0, 2, 3, 5, 7]))
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([1, 2, 4]))
    assert program.kept["up.weight"][0].tolist() == [2, 3, 7]
    assert program.kept["down.weight"][1].tolist() == [2, 3, 7]
    assert torch.equal(program.tensor("up.weight"), original[[2, 3, 7]])
    assert 1 not in program.kept["up.weight"]


def test_keep_on_two_axes_and_by_a_tied_name(program):
    original = program.tensor("up.weight").detach().clone()
    with program.edit() as edit:
        x = program.input_nodes[0]
        users = list(x.users)
        cut = edit.call(
            aten.slice.Tensor,
            (x, 1, 1, 3),
            like=node_of(program, aten.relu.default),
            before=users[0],
        )
        edit.replace(x, cut, users=users)
        edit.keep("tied.weight", {1: torch.tensor([1, 2])})
    assert {name: list(axes) for name, axes in program.kept.items()} == {"up.weight": [1]}
    assert program.kept["up.weight"][1].tolist() == [1, 2]
    assert torch.equal(program.tensor("tied.weight"), original[:, 1:3])
    assert program.tensor("tied.weight") is program.tensor("up.weight")
    assert program.tensor("up.weight").is_contiguous()


def test_zeroed_indices_are_original_and_accumulate(program):
    with program.edit() as edit:
        edit.record_zeroed("tied.weight", 0, torch.tensor([1, 4]))
        keep_hidden(edit, torch.tensor([0, 2, 3, 5, 6, 7]))
    with program.edit() as edit:
        edit.record_zeroed("up.weight", 0, torch.tensor([0, 3]))
        keep_hidden(edit, torch.tensor([1, 2, 4, 5]))
    assert program.zeroed["up.weight"][0].tolist() == [0, 1, 4, 5]
    assert program.kept["up.weight"][0].tolist() == [2, 3, 6, 7]


def test_parameters_stay_parameters(program):
    frozen = program.tensor("down.weight")
    frozen.requires_grad_(False)
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor([0, 1]))
        edit.set_tensor("scale", torch.zeros(3))
    for name, trainable in (("up.weight", True), ("down.weight", False)):
        assert isinstance(program.tensor(name), nn.Parameter)
        assert program.tensor(name).requires_grad is trainable
        assert program.tensor(name).is_leaf
    assert not isinstance(program.tensor("scale"), nn.Parameter)
    assert program.entries["scale"].kind is TensorKind.BUFFER


def test_a_parameter_can_become_integer(program):
    weight = program.tensor("down.weight")
    with program.edit() as edit:
        edit.set_tensor("down.weight", (weight * 10).to(torch.int8))
        node = program.tensor_nodes["down.weight"]
        (linear,) = node.users
        cast = edit.call(aten.to.dtype, (node, torch.float32), like=linear, before=linear)
        edit.replace(node, cast, users=[linear])
    assert program.tensor("down.weight").dtype is torch.int8
    assert program.run(R(2, 4)).dtype is torch.float32


def test_dead_tensors_and_their_aliases_go(program):
    with program.edit() as edit:
        norm = node_of(program, aten.layer_norm.default)
        edit.replace(norm, edit.call(aten.zeros_like.default, (norm.args[0],), like=norm))
    assert "norm.weight" not in program.entries
    assert "tied.weight" in program.aliases
    with program.edit() as edit:
        zeros = node_of(program, aten.zeros_like.default)
        (relu,) = zeros.users
        edit.set_args(relu, (edit.call(aten.zeros.default, ([2, 8],), like=zeros, before=zeros),))
    assert set(program.entries) == {"down.weight", "down.bias", "scale"}
    assert not program.aliases
    assert set(program.tensor_nodes) == set(program.entries)
    # The input is part of the signature, read or not.
    assert len(program.input_nodes) == 1
    assert "unread" in program.carried


def test_added_tensors_come_before_the_inputs(program):
    mul = node_of(program, aten.mul.Tensor)
    with program.edit() as edit:
        shift = edit.add_tensor("a.shift", torch.ones(3), TensorKind.PARAMETER)
        edit.replace(mul, edit.call(aten.add.Tensor, (mul, shift), like=mul))
    assert program.parameters["a.shift"].requires_grad
    assert len(program.input_nodes) == 1
    x = R(2, 4)
    assert program.run(x).shape == (2, 3)


def test_added_tensors_may_have_names_that_are_no_identifiers(program):
    # As modules have that were added with add_module("block1-0", ...).
    last = node_of(program, aten.mul.Tensor)
    names = ("block-0.shift", "block_0.shift", "block.0.shift")
    with program.edit() as edit:
        for name in names:
            shift = edit.add_tensor(name, torch.ones(3))
            new = edit.call(aten.add.Tensor, (last, shift), like=last)
            edit.replace(last, new)
            last = new
    assert set(names) <= set(program.entries)
    assert all(program.tensor_nodes[name].name.isidentifier() for name in names)
    x = R(2, 4)
    torch.testing.assert_close(CompiledModel(program, "eager")(x), program.run(x))


@pytest.mark.parametrize("name", ["up.weight", "tied.weight", "unread"])
def test_a_taken_name_is_refused(program, name):
    with pytest.raises(ValueError, match=f"a tensor named {name} exists"), program.edit() as edit:
        edit.add_tensor(name, torch.ones(3))


def test_the_edited_program_equals_the_smaller_model():
    model = Net().eval()
    program = capture(model, (R(2, 4),), dynamic_shapes="auto")
    rows = [0, 2, 3, 7]
    with program.edit() as edit:
        keep_hidden(edit, torch.tensor(rows))
    x = R(5, 4)
    hidden = 2 * x @ model.up.weight[rows].T + model.up.bias[rows]
    normed = F.layer_norm(hidden, [4], model.norm.weight[rows], model.norm.bias[rows])
    expected = torch.relu(normed) @ model.down.weight[:, rows].T + model.down.bias
    torch.testing.assert_close(program.run(x), expected)
