"""Erasing in steps: what it adds up to, training in between, and one step being the plain pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.erase_models import BIG, SMALL, program
from torchlathe.ir import InputError, PassError, Program, UnsupportedError
from torchlathe.ir.trainable import TrainableProgram
from torchlathe.passes import PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.passes.rewrite.allocation.budgets import Ramp


def erase(before: Program, verify: Any = "fast", **options: Any) -> Program:
    return PassManager([StructuredErase(**options)], verify=verify).run(before)


def kept(of: Program) -> dict[str, dict[int, list[int]]]:
    return {n: {a: i.tolist() for a, i in axes.items()} for n, axes in of.kept.items()}


def zeroed_outputs(before: Program, after: Program) -> Any:
    """What the full-size program gives whose slices are zero where ``after`` says so."""

    def zero(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        for axis, indices in after.zeroed.get(name, {}).items():
            tensor.index_fill_(axis, indices, 0)
        return tensor

    args, kwargs = before.example_inputs
    return before.run(*args, replace_tensor=zero, dtype=torch.float64, **kwargs)


def assert_same(got: Any, want: Any) -> None:
    pairs = zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True
    )
    for a, b in pairs:
        if isinstance(a, Tensor):
            # float64 throughout, but for biases that folding stored in float32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


# -- ramps -----------------------------------------------------------------------------------


@given(
    final=st.floats(0.01, 1),
    steps=st.integers(1, 9),
    kind=st.sampled_from(["geometric", "linear"]),
)
def test_a_ramp_goes_down_to_the_share(final: float, steps: int, kind: str) -> None:
    ramp = Ramp(steps, kind)
    shares = [ramp.share(final, step) for step in range(1, steps + 1)]
    assert shares[-1] == final
    assert all(a >= b for a, b in zip([1.0, *shares], shares, strict=False))


def test_the_two_kinds_of_ramp() -> None:
    linear = [Ramp(4, "linear").share(0.2, step) for step in (1, 2, 3, 4)]
    assert linear == pytest.approx([0.8, 0.6, 0.4, 0.2])
    geometric = [Ramp(4, "geometric").share(1 / 16, step) for step in (1, 2, 3, 4)]
    assert geometric == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16])


# -- steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", ["geometric", "linear"])
@pytest.mark.parametrize("name", [*SMALL, *BIG])
def test_three_steps_are_exact_and_on_record(name: str, ramp: str) -> None:
    before = program(name)
    after = erase(before, sparsity=0.5, steps=3, ramp=ramp)
    record = after.history[-1]
    assert record.exactness == "exact"
    assert record.verification["passed"]
    assert_same(
        after.run(*after.example_inputs[0], dtype=torch.float64), zeroed_outputs(before, after)
    )
    for tensor, axes in after.kept.items():
        original = before.entries[tensor].tensor
        for axis, indices in axes.items():
            assert len(indices) == after.entries[tensor].tensor.shape[axis]
            assert indices.tolist() == sorted(set(indices.tolist()))
            assert int(indices.max()) < original.shape[axis]
    untouched = [
        n for n, t in after.parameters.items() if n not in after.kept and n in before.entries
    ]
    assert all(torch.equal(after.parameters[n], before.parameters[n]) for n in untouched[:5])


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"flops": 0.5}, {"params": 0.6}], ids=str)
def test_steps_end_where_one_step_does(options: dict[str, Any]) -> None:
    before = program("attention")
    one, three = erase(before, **options), erase(before, steps=3, **options)
    costs = [(p.cost().parameters, p.cost().flops_at()) for p in (before, one, three)]
    # Other units, but as many parameters (or FLOPs) to within the largest unit.
    assert abs(costs[1][0] - costs[2][0]) < 0.2 * costs[0][0]
    assert "is what was reached" not in str(three.history[-1].diagnostics)


def test_given_scores_follow_their_units() -> None:
    before = program("attention")
    family = before.analysis(ZeroInvariantGroups).by_name("up.weight:0")
    options = {
        "importance": torch.randperm(family.extent).double(),
        "include": ("up.weight:0",),
        "sparsity": {"up.weight:0": 0.5},
    }
    assert kept(erase(before, **options)) == kept(erase(before, steps=4, **options))
    options["sparsity"] = 0.5
    options["importance"] = {"up.weight:0": options["importance"]}
    assert kept(erase(before, **options)) == kept(erase(before, steps=4, **options))


def test_shares_of_units_in_steps() -> None:
    before = program("attention")
    names = {f.name: f.extent for f in before.analysis(ZeroInvariantGroups).prunable}
    after = erase(before, sparsity={"up.weight:0": 0.5, "qkv.weight:0/1": 0.5}, steps=3)
    assert after.parameters["up.weight"].shape[0] == names["up.weight:0"] // 2
    assert after.parameters["out.weight"].shape[1] == 8  # 2 of 4 heads of 4


def test_after_an_earlier_pass() -> None:
    before = program("gates")
    text = "structured-erase{sparsity=0.2},structured-erase{sparsity=0.4,steps=3}"
    after = PassManager(text, verify="full").run(before)
    assert_same(
        after.run(*after.example_inputs[0], dtype=torch.float64), zeroed_outputs(before, after)
    )


def test_compensation_comes_nearer_to_the_original() -> None:
    before = program("attention")
    calibration = [torch.randn(8, 5, 6) for _ in range(4)]
    args, _ = before.example_inputs
    want = before.run(*args).detach()

    def error(**options: Any) -> float:
        made = StructuredErase(sparsity=0.3, include=("up.weight:0",), **options)
        after = PassManager([made]).run(before, calibration=calibration)
        assert after.history[-1].exactness == (
            "approximate" if options.get("compensate") else "exact"
        )
        return float((after.run(*args).detach() - want).norm() / want.norm())

    for steps in (1, 3):
        assert error(steps=steps, compensate=True) < 0.9 * error(steps=steps)


def test_importance_is_new_at_each_step() -> None:
    seen: list[int] = []

    def count(family: Any, program: Program) -> Tensor:
        seen.append(family.extent)
        return torch.arange(float(family.extent))

    erase(program("attention"), importance=count, include=("up.weight:0",), sparsity=0.5, steps=3)
    assert len(seen) == 3
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > seen[-1]


def test_progress_is_told() -> None:
    told: list[str] = []
    manager = PassManager([StructuredErase(sparsity=0.5, steps=2)], verify="off")
    manager.run(program("attention"), progress=told.append)
    assert [line for line in told if line.startswith("step")] == ["step 1 of 2", "step 2 of 2"]


# -- training in between ---------------------------------------------------------------------


def train(module: nn.Module, step: int) -> None:
    x = torch.randn(16, 5, 6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def test_training_between_steps() -> None:
    before = program("attention")
    state = {n: t.detach().clone() for n, t in before.parameters.items()}
    calls: list[tuple[int, int]] = []

    def between(module: nn.Module, step: int) -> None:
        calls.append((step, sum(p.numel() for p in module.parameters())))
        train(module, step)

    after = erase(before, sparsity=0.5, steps=3, between=between)
    record = after.history[-1]
    assert [step for step, _ in calls] == [1, 2]
    assert calls[0][1] > calls[1][1] > after.cost().parameters
    assert record.exactness == "trained"
    assert record.verification is None
    assert record.statistics["trained_tensors"] > 0
    # What is kept is on record, but the values are not those of the model any more.
    assert after.kept["up.weight"][0].numel() == after.parameters["up.weight"].shape[0]
    assert after.rewritten
    assert all(torch.equal(t, state[n]) for n, t in before.parameters.items())


def test_a_callback_that_only_looks_keeps_the_erase_exact() -> None:
    before = program("attention")
    looked = erase(before, sparsity=0.5, steps=2, between=lambda module, step: None)
    plain = erase(before, sparsity=0.5, steps=2)
    assert looked.history[-1].exactness == "exact"
    assert kept(looked) == kept(plain)


def test_a_callback_that_fails_leaves_the_program() -> None:
    def fail(module: nn.Module, step: int) -> None:
        raise ValueError("out of data")

    before = program("attention")
    with pytest.raises(PassError, match="out of data"):
        erase(before, sparsity=0.5, steps=2, between=fail)
    assert not before.kept


def test_a_callback_that_replaces_a_tensor() -> None:
    def replace(module: nn.Module, step: int) -> None:
        module.get_submodule("up").weight = nn.Parameter(torch.zeros(1, 1))

    with pytest.raises(PassError, match=r"training replaced up\.weight") as failure:
        erase(program("attention"), sparsity=0.5, steps=2, between=replace)
    assert isinstance(failure.value.__cause__, InputError)


def test_the_trainable_module_is_the_model() -> None:
    for name in ("attention", "llama"):
        original = program(name)
        module = TrainableProgram(original)
        args, kwargs = original.example_inputs
        got = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
        want = torch.utils._pytree.tree_leaves(original.run(*args, **kwargs))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert dict(module.named_parameters()).keys() == original.parameters.keys()
        assert not module.changed()
        got[0].sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
        assert all(t.grad is None for t in original.parameters.values())


def test_tied_parameters_are_tied_in_the_trainable_module() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.b.weight = self.a.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(self.a(ids))

    import torchlathe as tl

    module = TrainableProgram(tl.capture(Tied().eval(), (torch.tensor([1, 2]),)))
    assert module.get_submodule("a").weight is module.get_submodule("b").weight
    assert len(list(module.parameters())) == 1


def test_a_program_without_values_cannot_be_trained() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import torchlathe as tl

    with FakeTensorMode():
        model, x = nn.Linear(3, 4), torch.randn(2, 3)
    with pytest.raises(UnsupportedError, match="no values"):
        TrainableProgram(tl.capture(model.eval(), (x,)))
