import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.passes.sample_passes import aten, relus, small_net
from torchlathe.ir import (
    InputError,
    Program,
    UnsupportedError,
    VerifyError,
    capture,
    equivalence,
    memory,
)
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import set_info
from torchlathe.ir.verifying import LastOutputs, cannot_run, check_equivalence, verify


def node(program: Program, target: Any) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=target)[0]


# --- well-formedness -----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Tuple-valued nodes, a data-dependent size, integers and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        a, b = self.linear(x).chunk(2, dim=-1)
        flat = torch.cat([a, b]).reshape(-1, 3)
        return {
            "y": (flat * torch.tensor([1.0, 2.0, 3.0])).sum(),
            "size": x.shape[0] * 2,
            "ids": ids + 1,
            "picked": x[ids > 0],
        }


@pytest.fixture
def mixed() -> Program:
    inputs = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    return capture(Mixed().eval(), inputs, dynamic_shapes="auto")


def test_captured_programs_are_well_formed(program: Program, mixed: Program) -> None:
    for item in (program, mixed):
        text = item.to_text()
        for level in ("off", "fast", "full"):
            verify(item, level)  # type: ignore[arg-type]
        assert item.to_text() == text


def drop_metadata(program: Program) -> None:
    del relus(program)[0].meta["val"]


def swap_nodes(program: Program) -> None:
    first = node(program, aten.linear.default)
    relus(program)[0].append(first)


def late_placeholder(program: Program) -> None:
    with program.graph.inserting_after(relus(program)[0]):
        program.graph.placeholder("late")


def change_shape(program: Program) -> None:
    entry = program.entries["0.weight"]
    program.entries["0.weight"] = type(entry)(torch.zeros(3, 4), entry.kind)


def change_dtype(program: Program) -> None:
    entry = program.entries["2.bias"]
    program.entries["2.bias"] = type(entry)(entry.tensor.half(), entry.kind)


def dead_tensor(program: Program) -> None:
    last = list(program.graph.find_nodes(op="call_function", target=aten.linear.default))[-1]
    last.args = last.args[:2]


def lose_tensor(program: Program) -> None:
    del program.entries["0.bias"]


def lose_placeholder(program: Program) -> None:
    last = list(program.graph.find_nodes(op="call_function", target=aten.linear.default))[-1]
    last.args = last.args[:2]
    program.graph.erase_node(program.tensor_nodes["2.bias"])


def same_tensor_twice(program: Program) -> None:
    nodes = program.tensor_nodes
    set_info(nodes["2.bias"], tensor="0.bias")


def tensor_after_inputs(program: Program) -> None:
    program.input_nodes[0].append(program.tensor_nodes["2.bias"])


def tensor_without_metadata(program: Program) -> None:
    del program.tensor_nodes["2.bias"].meta["val"]


def more_outputs(program: Program) -> None:
    output = program.output_node
    output.args = ((*output.args[0], relus(program)[0]),)  # type: ignore[misc]


def nested_output(program: Program) -> None:
    output = program.output_node
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]


def more_inputs(program: Program) -> None:
    with program.graph.inserting_before(node(program, aten.linear.default)):
        program.graph.placeholder("more")


def mutate(program: Program) -> None:
    relus(program)[0].target = aten.relu_.default


def lost_alias(program: Program) -> None:
    program.aliases["tied"] = "nothing"


def wrong_kept(program: Program) -> None:
    program.kept["0.weight"] = {0: torch.arange(5)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_metadata, "a node without metadata\n  where: %relu = aten.relu.default in 1"),
        (swap_nodes, "the graph is not well formed: "),
        (late_placeholder, "a placeholder comes after the first call\n  where: %late"),
        (
            change_shape,
            "0.weight is float32[3, 4], but the graph takes it for float32[8, 4]\n"
            "  where: %p_0_weight = p_0_weight\n"
            "  next:  replace tensors through Edit.set_tensor, which updates both",
        ),
        (change_dtype, "2.bias is float16[3], but the graph takes it for float32[3]"),
        (dead_tensor, "2.bias is dead: nothing reads it\n  where: %p_2_bias"),
        (lose_tensor, "0.bias has a placeholder but no tensor"),
        (lose_placeholder, "2.bias has a tensor but no placeholder"),
        (same_tensor_twice, "0.bias has two placeholders"),
        (tensor_after_inputs, "2.bias comes after the inputs"),
        (tensor_without_metadata, "2.bias has no metadata"),
        (more_outputs, "the graph gives 2 outputs, the signature has 1"),
        (nested_output, "the last node is not an output with one flat tuple"),
        (more_inputs, "the graph takes 2 inputs, the signature has 1"),
        (mutate, "a node writes into its input"),
        (lost_alias, "tied is tied to nothing, which is not a tensor of the program"),
        (wrong_kept, "0.weight has extent 8 on axis 0, but 5 indices are on record as kept"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_each_broken_invariant_is_named(
    program: Program, damage: Callable[[Program], None], message: str
) -> None:
    damage(program)
    verify(program, "off")
    with pytest.raises(VerifyError) as caught:
        verify(program)
    assert str(caught.value).startswith(message)


def test_level_full_runs_each_node_on_fake_tensors(program: Program) -> None:
    relu = relus(program)[0]
    relu.meta["val"] = relu.meta["val"].transpose(0, 1)
    verify(program, "fast")
    with pytest.raises(
        VerifyError, match=r"says float32\[8, s\d+\], but the node gives float32\[s"
    ):
        verify(program, "full")


def test_level_full_names_a_node_that_does_not_accept_its_inputs(program: Program) -> None:
    first, second = program.graph.find_nodes(op="call_function", target=aten.linear.default)
    weights = first.args[1], second.args[1]
    first.update_arg(1, weights[1])
    second.update_arg(1, weights[0])
    with pytest.raises(VerifyError) as caught:
        verify(program, "full")
    assert "aten.linear.default does not accept its inputs" in str(caught.value)
    assert "%linear = aten.linear.default in 0" in str(caught.value)


# --- equivalence ---------------------------------------------------------------------------------


def edited(program: Program, change: Callable[[Any, Program], None]) -> Program:
    other = program.copy()
    with other.edit() as edit:
        change(edit, other)
    return other


def scaled(factor: float) -> Callable[[Any, Program], None]:
    def change(edit: Any, program: Program) -> None:
        edit.set_tensor("2.weight", program.tensor("2.weight") * factor)

    return change


def test_a_program_equals_itself(program: Program, mixed: Program) -> None:
    for item in (program, mixed):
        found = check_equivalence(item, item.copy())
        assert found.passed
        assert found.max_abs_error == found.max_rel_error == 0.0
        assert (found.dtype, found.tolerance, found.detail) == ("float64", 1e-9, None)


def test_a_difference_is_measured_against_the_largest_output(program: Program) -> None:
    other = edited(program, scaled(1.01))
    found = check_equivalence(program, other)
    assert not found.passed
    args, _ = program.example_inputs
    with torch.no_grad():
        want, got = (p.run(*args, dtype=torch.float64) for p in (program, other))
    gap = float((want - got).abs().max())
    assert found.max_abs_error == pytest.approx(gap)
    assert found.max_rel_error == pytest.approx(gap / float(want.abs().max()))
    assert found.detail is not None
    assert found.detail.startswith("output 0 differs by 0.0")
    assert "%linear_1 = aten.linear.default in 2" in found.detail


def test_where_programs_begin_to_differ_is_looked_for_only_if_asked(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = edited(program, scaled(1.1))
    with_place = check_equivalence(program, other)
    assert "first node that differs" in (with_place.detail or "")
    monkeypatch.setattr(equivalence, "_Watch", None)  # to look would be an error
    found = check_equivalence(program, other, locate=False)
    assert not found.passed
    assert found.max_rel_error == with_place.max_rel_error


def test_new_values_are_allowed_the_rounding_of_where_they_are_stored(program: Program) -> None:
    found = check_equivalence(program, edited(program, scaled(1 + 1e-6)))
    assert found.passed
    assert (found.dtype, found.tolerance) == ("float64", 1e-5)
    assert 1e-7 < found.max_rel_error < 1e-5


def test_a_selection_of_old_values_is_not(program: Program) -> None:
    kept = torch.tensor([0, 1, 3, 4, 5, 6])

    def erase(edit: Any, program: Program) -> None:
        edit.keep("0.weight", {0: kept})
        edit.keep("0.bias", {0: kept})
        edit.keep("2.weight", {1: kept})

    def zero(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("0."):
            return tensor
        tensor = tensor.detach().clone()
        tensor[[2, 7]] = 0
        return tensor

    other = edited(program, erase)
    found = check_equivalence(program, other, reference=zero)
    assert (found.passed, found.tolerance) == (True, 1e-9)
    assert not check_equivalence(program, other).passed

    def erase_more(edit: Any, program: Program) -> None:
        for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
            edit.keep(name, {axis: torch.tensor([0, 2, 3, 5])})

    # Indices into what an earlier pass left are told from original ones.
    smaller = edited(other, erase_more)
    assert smaller.kept["0.weight"][0].tolist() == [0, 3, 4, 6]
    assert check_equivalence(other, smaller).tolerance == 1e-9


def test_given_inputs_are_used(program: Program) -> None:
    other = edited(program, scaled(2.0))
    zeros: Any = ((torch.zeros(5, 4),), {})
    with torch.no_grad():
        bias = program.run(torch.zeros(5, 4)) - program.tensor("2.bias")
    assert check_equivalence(program, other, inputs=zeros).max_abs_error == pytest.approx(
        float(bias.abs().max()), rel=1e-5
    )
    with pytest.raises(InputError, match="dimension 1 is static"):
        check_equivalence(program, other, inputs=((torch.zeros(5, 3),), {}))


def test_outputs_that_are_not_floating_must_be_equal(mixed: Program) -> None:
    def change(edit: Any, program: Program) -> None:
        add = next(n for n in program.nodes if n.target is aten.add.Tensor)
        edit.set_args(add, (add.args[0], 2))

    found = check_equivalence(mixed, edited(mixed, change))
    assert not found.passed
    assert found.max_rel_error == 0.0
    assert found.detail == "output 2 differs in 2 of 2 elements"


class Special(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x / 0.0, (x - x) / (x - x), torch.zeros_like(x), x[:0]


def test_nan_and_infinity_equal_themselves() -> None:
    program = capture(Special(), (torch.randn(2, 3),))
    assert check_equivalence(program, program.copy()).passed

    def change(edit: Any, program: Program) -> None:
        zeros = node(program, aten.zeros_like.default)
        edit.replace(zeros, edit.call(aten.div.Tensor, (zeros, 0.0), like=zeros))

    found = check_equivalence(program, edited(program, change))
    assert not found.passed
    assert found.max_rel_error == float("inf")


class NoDouble(nn.Module):
    """The weight is float32 only where the op is: quantized ops take no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(F.linear(x, self.weight), 0.1, 0, -128, 127)


def test_ops_that_take_no_float64_are_compared_in_their_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = capture(NoDouble(), (torch.randn(2, 4),))
    run = run_flat

    def refuse(*args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        if dtype is not None:
            raise RuntimeError("not implemented for 'Double'")
        return run(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(equivalence, "run_flat", refuse)
    found = check_equivalence(program, program.copy())
    assert (found.passed, found.dtype, found.tolerance) == (True, "float32", 2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_memory_decides_the_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(small_net().to(dtype), (torch.randn(2, 4, dtype=dtype),))
    wide = check_equivalence(program, program.copy())
    assert wide.dtype == "float64"
    weight, activation = 8 * 4 * 8, 2 * 8 * 8
    assert memory.peak(program, program.example_inputs, torch.float64) == (
        2 * 4 * 8 + weight + 8 * 8 + activation
    )
    monkeypatch.setattr(memory, "available", lambda program: 100)
    narrow = check_equivalence(program, program.copy())
    assert narrow.passed
    assert narrow.dtype == str(dtype).removeprefix("torch.")
    assert narrow.tolerance > 1e-2


def test_free_memory_is_known_here(program: Program) -> None:
    free = memory.available(program)
    assert free is None or free > 2**20


def test_a_program_that_does_not_run_is_told_by_its_node(program: Program) -> None:
    other = program.copy()
    linear = node(other, aten.linear.default)
    linear.args = (linear.args[0], other.tensor_nodes["2.weight"], None)
    with pytest.raises(VerifyError) as caught:
        check_equivalence(program, other)
    assert caught.value.message.startswith("the changed program does not run: ")
    assert caught.value.where is not None
    assert caught.value.where.startswith("%linear = aten.linear.default in 0")


def test_a_cast_that_the_graph_fixes_widens_the_tolerance() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex64) * 1j).imag

    program = capture(Complex(), (torch.randn(2, 3),))
    found = check_equivalence(program, program.copy())
    assert (found.passed, found.dtype, found.tolerance) == (True, "float32", 2e-4)


def test_random_ops_draw_the_same_numbers() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    program = capture(Noisy(), (torch.randn(2, 3),))
    state = torch.get_rng_state()
    assert check_equivalence(program, program.copy()).passed
    assert torch.equal(torch.get_rng_state(), state)


def test_programs_without_values_cannot_be_compared() -> None:
    with FakeTensorMode():
        program = capture(small_net(), (torch.randn(2, 4),))
    assert cannot_run(program) is not None
    verify(program, "full")
    with pytest.raises(UnsupportedError, match="fake tensors, which have no values"):
        check_equivalence(program, program)
    real = capture(small_net(), (torch.randn(2, 4),))
    assert cannot_run(real) is None


def test_nothing_is_changed_by_comparing(program: Program) -> None:
    state = copy.deepcopy({name: e.tensor for name, e in program.entries.items()})
    fingerprint = program.fingerprint()
    check_equivalence(program, edited(program, scaled(2.0)))
    assert program.fingerprint() == fingerprint
    for name, tensor in state.items():
        assert torch.equal(tensor, program.tensor(name))


class Mixes(nn.Module):
    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows] * 2


def sizes_compared(program: Program, monkeypatch: pytest.MonkeyPatch) -> set[torch.Size]:
    """Shapes of the inputs that a comparison runs on."""
    seen = set()

    def watched(program: Program, flat: Any, **options: Any) -> Any:
        seen.add(flat[0].shape)
        return run_flat(program, flat, **options)

    monkeypatch.setattr(equivalence, "run_flat", watched)
    assert check_equivalence(program, program.copy()).passed
    return seen


def test_two_samples_of_a_batch_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(16, 3)
    dynamic = capture(nn.Linear(3, 2), (x,), dynamic_shapes="auto")
    assert sizes_compared(dynamic, monkeypatch) == {torch.Size([2, 3])}


def test_all_of_what_is_no_batch_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = torch.randn(16, 3), torch.tensor([15, 3, 8])
    assert sizes_compared(capture(nn.Linear(3, 2), (x,)), monkeypatch) == {x.shape}
    dims = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    # Of a graph's nodes none can be left out: the edges name them by number.
    assert sizes_compared(capture(Mixes(), (x, rows), dynamic_shapes=dims), monkeypatch) == {
        x.shape
    }


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that a comparison runs, in turn."""
    ran: list[Program] = []

    def watched(program: Program, flat: Any, **options: Any) -> Any:
        ran.append(program)
        return run_flat(program, flat, **options)

    monkeypatch.setattr(equivalence, "run_flat", watched)
    return ran


def test_what_a_pass_left_is_not_run_again(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = program, edited(program, scaled(2.0))
    third = edited(second, scaled(0.5))
    apart = check_equivalence(second, third).max_abs_error
    ran, last = counted(monkeypatch), LastOutputs()
    check_equivalence(first, second, locate=False, last=last)
    assert ran == [first, second]
    found = check_equivalence(second.copy(), third, locate=False, last=last)
    assert ran == [first, second, third]
    assert found.max_abs_error == apart > 0


@pytest.mark.parametrize("change", ["version", "weight", "inputs", "dtype", "reference", "size"])
def test_kept_outputs_are_used_only_where_they_are_right(
    change: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = program, edited(program, scaled(2.0))
    if change == "size":
        monkeypatch.setattr(equivalence, "_MOST_KEPT", 8)
    ran, last = counted(monkeypatch), LastOutputs()
    check_equivalence(first, second, last=last, locate=False)
    before = second
    options: dict[str, Any] = {}
    if change == "version":
        before = edited(second, scaled(3.0))
    elif change == "weight":
        with torch.no_grad():
            second.tensor("2.weight").mul_(3.0)
    elif change == "inputs":
        (x,), _ = program.example_inputs
        options = {"inputs": ((x.clone(),), {})}
    elif change == "dtype":
        options = {"dtype": torch.float32}
    elif change == "reference":
        options = {"reference": lambda name, tensor: tensor * 0}
    ran.clear()
    check_equivalence(before, second.copy(), locate=False, last=last, **options)
    assert len(ran) == 2


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, edges: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(edges, self.linear(x))


def test_what_has_no_storage_is_compared_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Sparse(), (torch.eye(4).to_sparse(), torch.randn(4, 4)))
    last, ran = LastOutputs(), counted(monkeypatch)
    for _ in range(2):
        assert check_equivalence(program, program.copy(), last=last).passed
    assert len(ran) >= 4


def test_outputs_are_let_go_of_with_what_they_look_at(program: Program) -> None:
    last, flat = LastOutputs(), program.flatten_inputs(*program.example_inputs)
    whole = torch.randn(1000, 4)
    last.keep(program, flat, torch.float64, [whole[:1]], frozenset())
    found = last.take(program.copy(), flat, torch.float64)
    assert found is not None
    assert found[0][0].untyped_storage().nbytes() == 16
    assert last.take(program, flat, torch.float64) is None


def test_another_program_of_the_same_age_is_another(program: Program) -> None:
    other = capture(small_net(), program.example_inputs[0], dynamic_shapes="auto")
    last, flat = LastOutputs(), program.flatten_inputs(*program.example_inputs)
    last.keep(program, flat, torch.float64, [torch.ones(1)], frozenset())
    assert other.state() == program.state()
    assert last.take(other, flat, torch.float64) is None
