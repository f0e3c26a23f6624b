"""Stacks of blocks as polynomials in depth, and models of another depth."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from tests.passes.sharing_models import HIDDEN, WIDTH, Stack, program_of
from torchlathe.ir import InputError, OptionError, Program
from torchlathe.ir.trainable import TrainableProgram
from torchlathe.passes import FitLayerBasis, PassManager
from torchlathe.passes.rewrite.sharing.layer_stacks import (
    FORMS,
    find_stacks,
    fit_components,
    layer_basis,
    recompose,
)


def polynomial_stack(depth: int, degree: int, seed: int = 0) -> Stack:
    """A stack whose parameters are polynomials of the position of their layer."""
    model = Stack(depth).eval()
    values = layer_basis(depth, degree + 1).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        names = dict(model.blocks[0].named_parameters())
        for name, first in names.items():
            theta = 0.2 * torch.randn(degree + 1, *first.shape, generator=generator)
            for block, row in zip(model.blocks, values, strict=True):
                block.get_parameter(name).copy_(torch.tensordot(row, theta, 1))
    return model


@functools.cache
def stack_program(depth: int = 6, degree: int | None = None) -> tuple[Program, torch.Tensor]:
    """A program of random blocks, or of `polynomial_stack`, captured once per process."""
    torch.manual_seed(0)
    return program_of(Stack(depth) if degree is None else polynomial_stack(depth, degree))


@pytest.mark.parametrize("form", ["chebyshev", "monomials"])
def test_both_forms_span_the_same_polynomials(form: Any) -> None:
    values = layer_basis(6, 3, form)
    assert values.shape == (6, 3)
    place = torch.linspace(0, 1, 6, dtype=torch.float64)
    for power in range(3):
        target = place**power
        fitted = values @ (torch.linalg.pinv(values) @ target)
        torch.testing.assert_close(fitted, target)
    assert torch.equal(layer_basis(1, 3, form)[:, 0], torch.ones(1, dtype=torch.float64))


def test_chebyshev_is_better_conditioned() -> None:
    conds = [torch.linalg.cond(layer_basis(12, 6, form)) for form in FORMS]
    assert conds[0] < conds[1] / 100


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 2**16))
@settings(max_examples=15)
def test_no_components_fit_better(count: int, components: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, 3, 4, generator=generator, dtype=torch.float64)
    roots = torch.randn(count, 6, 4, generator=generator, dtype=torch.float64)
    moments = roots.transpose(1, 2) @ roots
    values = layer_basis(count, components)
    plain = fit_components(list(weights), values)
    weighted = fit_components(list(weights), values, list(moments))

    def plain_error(theta: torch.Tensor) -> float:
        return float((torch.tensordot(values, theta, 1) - weights).square().sum())

    def weighted_error(theta: torch.Tensor) -> float:
        d = torch.tensordot(values, theta, 1) - weights
        return float((d @ moments * d).sum())

    nudge = 1e-3 * torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    # Both are sums of up to 60 squares in float64; the weighted fit is damped by 1e-10.
    assert plain_error(plain) <= plain_error(plain + nudge) + 1e-9
    assert plain_error(plain) <= plain_error(weighted) + 1e-9
    assert weighted_error(weighted) <= weighted_error(weighted + nudge) + 1e-6
    assert weighted_error(weighted) <= weighted_error(plain) + 1e-6
    if components >= count:
        assert plain_error(plain) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("curvature", ["none", "inputs"])
def test_a_stack_on_a_polynomial_loses_nothing(curvature: Any) -> None:
    model = polynomial_stack(6, degree=2)
    program, x = stack_program(6, 2)
    result = PassManager([FitLayerBasis(components=3, curvature=curvature)]).run(
        program, calibration=[x]
    )
    # float32 weights that are computed anew, through six residual layers.
    torch.testing.assert_close(result.run(x), model(x), rtol=1e-4, atol=1e-4)
    block = 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    assert result.history[-1].statistics["saved"] == 3 * block
    assert result.tensor("blocks.basis.up.weight").shape == (3, HIDDEN, WIDTH)


def test_more_components_lose_less() -> None:
    program, x = stack_program()
    errors = []
    for components in (1, 3, 5):
        result = PassManager([FitLayerBasis(components=components)]).run(program)
        errors.append(float((result.run(x) - program.run(x)).detach().norm()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("depth", [1, 3, 6, 9])
def test_another_depth_is_a_valid_model(depth: int) -> None:
    model = polynomial_stack(6, degree=2)
    program, x = stack_program(6, 2)
    result = PassManager("fit-layer-basis{components=3}").run(program)
    other = Stack(depth).eval()
    other.load_state_dict(recompose(result, depth))
    out = other(x)
    assert bool(out.isfinite().all())
    if depth == 6:
        torch.testing.assert_close(out, result.run(x), rtol=1e-5, atol=1e-5)
    if depth > 1:
        # The ends of the stack are those of the original, whatever lies between.
        for end, original in (
            (other.blocks[0], model.blocks[0]),
            (other.blocks[-1], model.blocks[-1]),
        ):
            torch.testing.assert_close(end.up.weight, original.up.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.head.weight, model.head.weight)


def test_components_are_trained_and_recomposed_with_what_was_learnt() -> None:
    program, x = stack_program()
    result = PassManager([FitLayerBasis(components=2)]).run(program)
    module: Any = TrainableProgram(result)
    assert dict(module.named_parameters()).keys() >= {"blocks.basis.up.weight", "head.weight"}
    loss = module(x).square().mean()
    loss.backward()
    assert float(module.get_parameter("blocks.basis.up.weight").grad.abs().sum()) > 0


def test_what_is_left_out_comes_from_the_nearest_block() -> None:
    model = Stack(4).eval()
    program, _ = program_of(model)
    result = PassManager([FitLayerBasis(components=2, exclude=("*.bias",))]).run(program)
    state = recompose(result, 7)
    assert torch.equal(state["blocks.6.up.bias"], model.blocks[3].up.bias)
    assert torch.equal(state["blocks.0.up.bias"], model.blocks[0].up.bias)
    assert state.keys() == Stack(7).state_dict().keys()


def test_erasing_takes_a_unit_from_all_layers() -> None:
    program, x = stack_program()
    result = PassManager("fit-layer-basis{components=3},structured-erase{sparsity=0.3}").run(
        program
    )
    assert result.tensor("blocks.basis.up.weight").shape[1] < HIDDEN
    assert result.history[-1].verification["passed"]
    assert result.run(x).shape == (32, 4)


def test_stacks_are_found_by_names_and_shapes() -> None:
    shapes = {f"encoder.layer.{i}.{n}": (4, 4) for i in range(3) for n in ("a", "b.c")}
    stacks = find_stacks({**shapes, "head": (2, 4), "encoder.layer.3.a": (9, 4)})
    assert [(s.prefix, len(s)) for s in stacks] == [("encoder.layer.", 3)]
    assert stacks[0].name(2, "b.c") == "encoder.layer.2.b.c"
    # Numbers with gaps: nobody could name the blocks of another depth.
    assert find_stacks({"0.weight": (2, 2), "2.weight": (2, 2)}) == ()


@pytest.mark.slow
def test_vit_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 8,
    }

    def make(depth: int) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.ViTConfig(num_hidden_layers=depth, **sizes)
        return transformers.ViTModel(config, add_pooling_layer=False).eval()

    x = torch.randn(2, 3, 16, 16)
    program = tl.capture(make(4), (), {"pixel_values": x})
    result = PassManager([FitLayerBasis(components=2)]).run(program)
    other = make(6)
    other.load_state_dict(recompose(result, 6))
    assert bool(other(pixel_values=x).last_hidden_state.isfinite().all())
    same = make(4)
    same.load_state_dict(recompose(result, 4))
    torch.testing.assert_close(
        same(pixel_values=x).last_hidden_state,
        result.run(pixel_values=x).last_hidden_state,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components is 0"),
        ({"form": "fourier"}, "form"),
        ({"curvature": "kfac"}, "curvature"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FitLayerBasis(**options)


def test_bad_input_is_told() -> None:
    program, _ = stack_program(2)
    result = PassManager([FitLayerBasis(components=3)]).run(program)
    assert not result.history[-1].changed
    assert "2 layers are not more than 3" in result.history[-1].diagnostics[0]["message"]
    with pytest.raises(InputError, match="no stack"):
        recompose(program, 4)
    fitted = PassManager([FitLayerBasis(components=1)]).run(program)
    with pytest.raises(InputError, match="a depth of 0"):
        recompose(fitted, 0)
    with pytest.raises(tl.Error, match="matches no stack"):
        PassManager([FitLayerBasis(include=("encoder",))]).run(program)
    model = Stack(3)
    with torch.no_grad():
        model.blocks[1].up.weight[0, 0] = torch.nan  # would be in all layers
    with pytest.raises(tl.Error, match="finite"):
        PassManager([FitLayerBasis(components=2)]).run(program_of(model)[0])
