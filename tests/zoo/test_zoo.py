"""Every network of the zoo: captured, erased, and equal to its zeroed twin."""

from __future__ import annotations

from fnmatch import fnmatch
from functools import partial

import pytest
import torch

import torchlathe as tl
from tests.zoo.models import HANDMADE, MODELS, ZooModel
from tests.zoo.oracle import (
    EXACT,
    F32_LIMIT,
    F64_LIMIT,
    Captured,
    captured,
    check_erased,
    check_family,
    check_structure,
    erased,
    in_float64,
    outputs,
    parameter_count,
    relative_error,
    same_tensors,
    zeroed_twin,
)
from torchlathe.ir import capture
from torchlathe.ir.verifying import verify
from torchlathe.passes import PassManager, StructuredErase, ZeroInvariantGroups

SAMPLED_FAMILIES = 6
SMALL = frozenset(model.name for model in HANDMADE)


def _parameters(models: list[ZooModel]) -> list:
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(m, id=m.name, marks=marks[m.slow]) for m in models]


every_model = pytest.mark.parametrize("zoo", _parameters(list(MODELS.values())))


def _units(case: Captured, family, generator: torch.Generator, share: float = 0.0) -> torch.Tensor:
    """One random unit, or that share of them (never all)."""
    count = min(max(1, round(share * family.extent)), family.extent - 1)
    return torch.randperm(family.extent, generator=generator)[:count].sort().values


def _sample(families: list, count: int) -> list:
    """Evenly spread over a list that is in the order of the graph."""
    if len(families) <= count:
        return families
    step = (len(families) - 1) / (count - 1)
    return [families[round(i * step)] for i in range(count)]


@every_model
def test_families(zoo: ZooModel) -> None:
    """Each family alone, in float64: one unit, then half of them; and what must be free is."""
    case = captured(zoo)
    for which in case.shapes:
        inputs = case.inputs(which)
        want = outputs(case.model, inputs)
        assert relative_error(outputs(case.program.run, inputs), want) <= 1e-12

    families = case.program.analysis(ZeroInvariantGroups)
    prunable = list(families.prunable)
    assert len({f.name for f in families}) == len(families)
    axes = {f"{s.name}[{s.axis}]" for family in prunable for s in family.slices}
    names = case.program.aliases
    missing = [a for a in zoo.free if a not in axes and _kept_name(a, names) not in axes]
    assert not missing, f"not prunable: {missing}; pins: {_pins(families)}"
    assert not [a for a in zoo.pinned if a in axes]
    covered = sum(
        t.numel()
        for name, t in case.program.parameters.items()
        if any(f"{name}[{axis}]" in axes for axis in range(t.dim()))
    )
    total = sum(t.numel() for t in case.program.parameters.values())
    assert covered >= zoo.coverage * total, f"{covered / total:.3f} covered; {_pins(families)}"
    loose = {
        f.name: f.reasons
        for f in prunable
        if f.exactness not in EXACT and not any(fnmatch(f.name, p) for p in zoo.approximate)
    }
    assert not loose, f"approximate: {loose}"

    generator = torch.Generator().manual_seed(0)
    chosen = prunable if zoo.name in SMALL else _sample(prunable, SAMPLED_FAMILIES)
    failures = []
    for family in chosen:
        for share in (0.0, 0.5):
            units = _units(case, family, generator, share)
            if not len(units):
                continue
            try:
                check_family(case, family, units)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                failures.append(f"{family.name} ({family.exactness}) {units.tolist()}: {text}")
    assert not failures, "\n".join(failures)
    assert case.unchanged()


def _kept_name(axis: str, aliases: dict[str, str]) -> str:
    name, bracket, rest = axis.partition("[")
    return aliases.get(name, name) + bracket + rest


def _pins(families) -> list[str]:
    return [f"{f.name}: {f.pins[0].reason if f.pins else '?'}" for f in families.pinned][:12]


@every_model
def test_erase_half(zoo: ZooModel) -> None:
    """Half of what can go, by magnitude over the whole model, in float64, at level full."""
    case = captured(zoo)
    manager = PassManager([StructuredErase(sparsity=0.5)], verify="full")
    after = manager.run(case.program)
    assert case.unchanged()
    check_structure(case.program, after)
    verify(after, "full")

    before, left = parameter_count(case.program), parameter_count(after)
    assert left < 0.85 * before, f"{left} of {before} parameters are left"
    twin = zeroed_twin(case.model, after.zeroed)
    moved = 0.0
    for which in case.shapes:
        inputs = case.inputs(which)
        want = outputs(twin, inputs)
        error = relative_error(outputs(in_float64(after.run), inputs), want)
        assert error <= case.limit, f"{error:.2e} at size {which}"
        moved = max(moved, relative_error(want, outputs(case.model, inputs)))
    assert moved > 1e-6


@every_model
def test_compile(zoo: ZooModel) -> None:
    """From the caller's float32 module to a compiled one, through the front door."""
    model = zoo.build()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in before.items()}
    args, kwargs = zoo.example(0)
    compiled = tl.compile(
        model,
        "structured-erase{sparsity=0.5}",
        args,
        example_kwargs=kwargs,
        dynamic_shapes=zoo.dynamic_shapes,
        measure_latency=False,
    )
    assert same_tensors(model, before)
    own = dict(compiled.named_parameters())
    pointers = {t.untyped_storage().data_ptr() for t in before.values() if t.numel()}
    assert not [n for n, t in own.items() if t.untyped_storage().data_ptr() in pointers]
    names = set(model.state_dict())
    missing = names - set(compiled.state_dict()) - set(compiled.program.dropped)
    assert not missing, f"not in the state dict: {missing}"
    assert sum(t.numel() for t in own.values()) < sum(t.numel() for t in model.parameters())
    for name, tensor in own.items():
        for axis, kept in compiled.kept.get(name, {}).items():
            assert tensor.shape[axis] == len(kept), (name, axis)

    reference = compiled.zeroed_reference(model)
    assert type(reference) is type(model)
    assert same_tensors(model, before)
    for which in range(len(zoo.sizes)):
        inputs = zoo.example(which)
        error = relative_error(outputs(compiled, inputs), outputs(reference, inputs))
        assert error <= F32_LIMIT, f"{error:.2e} at size {which}"


@pytest.mark.parametrize(
    "name", ["residual_cnn", "dense_block", "rms_norm_mlp", "gqa_rotary", "fused_qkv_unbind"]
)
def test_zeros_finds_what_was_zeroed(name: str) -> None:
    """A model with zeros in it, erased by ``zeros=true``, is the model erased by magnitude."""
    case = captured(MODELS[name])
    after = PassManager("structured-erase{sparsity=0.4}").run(case.program)
    twin = zeroed_twin(case.model, after.zeroed)
    args, kwargs = case.inputs(0)
    program = capture(twin, args, kwargs, dynamic_shapes=case.zoo.dynamic_shapes)
    found = PassManager("structured-erase{zeros=true}", verify="full").run(program)
    kept = {n: {a: i.tolist() for a, i in axes.items()} for n, axes in after.kept.items()}
    assert {n: {a: i.tolist() for a, i in axes.items()} for n, axes in found.kept.items()} == kept
    again = PassManager("structured-erase{zeros=true}").run(found)
    assert not again.history[-1].changed
    for which in case.shapes:
        inputs = case.inputs(which)
        assert relative_error(outputs(found.run, inputs), outputs(twin, inputs)) <= F64_LIMIT


@pytest.mark.parametrize("name", ["residual_cnn", "gqa_rotary", "fused_qkv_unbind"])
def test_oracle_sees_a_wrong_unit(name: str) -> None:
    """Negative control: the twin of a neighbouring unit must not pass."""
    case = captured(MODELS[name])
    seen = 0
    for family in case.program.analysis(ZeroInvariantGroups).prunable:
        after, _ = erased(case.program, {family.name: torch.tensor([0])})
        _, wrong = erased(case.program, {family.name: torch.tensor([1])})
        inputs = case.inputs(0)
        want = outputs(in_float64(case.program.run, replace_tensor=wrong), inputs)
        assert relative_error(outputs(after.run, inputs), want) > 1e3 * F64_LIMIT, family.name
        seen += 1
    assert seen


def test_oracle_sees_a_missing_slice() -> None:
    """Negative control: a twin that lacks one written slice must not pass."""
    case = captured(MODELS["residual_cnn"])
    family = case.program.analysis(ZeroInvariantGroups).of("stem.0.weight", 0)[0]
    after, zeroing = erased(case.program, {family.name: torch.tensor([2, 5])})
    check_erased(case, after, zeroing)
    name = next(s.name for s in family.writers if s.name.endswith("1.bias"))
    lacking = partial(_all_but, zeroing, name)
    with pytest.raises(AssertionError, match="zeroed graph"):
        check_erased(case, after, lacking)
    after.zeroed.pop(name)
    with pytest.raises(AssertionError, match="zeroed module"):
        check_erased(case, after, zeroing)


def _all_but(zeroing, left_out: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if name == left_out else zeroing(name, tensor)
