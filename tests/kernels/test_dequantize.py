"""The logical form: formats, packing, and the ops that read stored numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchlathe.ir import OptionError
from torchlathe.kernels.dequantize import op
from torchlathe.kernels.dequantize.formats import FORMATS, decode, encode, format_of, pack, unpack

ops = torch.ops.torchlathe
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(1, 40), st.integers(0, 2**31))
def test_packing_round_trip(name: str, columns: int, seed: int) -> None:
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, columns, generator=generator) * form.most
    codes = encode(x, form)
    stored = pack(codes, form)
    assert stored.dtype == form.stored
    assert stored.shape == (3, -(-columns // form.each))
    assert torch.equal(unpack(stored, form, columns), codes)
    # What is on the grid stays: decoding and encoding again is the identity.
    values = decode(codes, form, None, torch.float64)
    assert torch.equal(decode(encode(values, form), form, None, torch.float64), values)


def test_e2m1_values_are_those_of_the_standard() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode(codes, FORMATS["mxfp4"], None, torch.float64)
    assert values.tolist() == [*E2M1, *(-value for value in E2M1)]


def test_e2m1_rounds_to_nearest_with_ties_to_even() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.75, -0.1])
    found = decode(encode(x, FORMATS["nvfp4"]), FORMATS["nvfp4"], None, torch.float32)
    assert found.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -1.0, 0.0]


def test_fp8_is_torch_own() -> None:
    x = torch.randn(100) * 100
    found = decode(encode(x, FORMATS["fp8"]), FORMATS["fp8"], None, torch.float32)
    assert torch.equal(found, x.to(torch.float8_e4m3fn).float())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(OptionError, match="no format 'int5'"):
        format_of("int5")


def _stored(name: str) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    form = FORMATS[name]
    torch.manual_seed(0)
    group = form.block or 16
    values = pack(encode(torch.randn(8, 40) * form.most, form), form)
    groups = -(-40 // group)
    if form.scales == "float":
        scales = torch.rand(8, groups) + 0.1
    else:
        scales = torch.randint(60, 120, (8, groups), dtype=torch.uint8)
    return values, scales, 40, group


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_dequantize_is_number_times_scale(name: str) -> None:
    values, scales, columns, group = _stored(name)
    form = FORMATS[name]
    total = torch.tensor(0.25) if name == "nvfp4" else None
    found = ops.dequantize(values, scales, None, total, columns, group, name, torch.float64)
    numbers = decode(unpack(values, form, columns), form, None, torch.float64)
    if form.scales == "e8m0":
        real = 2.0 ** (scales.double() - 127)
    elif form.scales == "e4m3":
        real = scales.view(torch.float8_e4m3fn).double() * 0.25
    else:
        real = scales.double()
    wanted = numbers * real.repeat_interleave(group, 1)[:, :columns]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_ops_pass_opcheck(name: str) -> None:
    values, scales, columns, group = _stored(name)
    total = torch.tensor(0.25) if name == "nvfp4" else None
    args = (values, scales, None, total, columns, group, name, torch.float32)
    torch.library.opcheck(ops.dequantize.default, args)


def test_zero_points_shift() -> None:
    values = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    scales, zeros = torch.rand(4, 2), torch.randint(-20, 20, (4, 2), dtype=torch.int8)
    found = ops.dequantize(values, scales, zeros, None, 0, 16, "int8", torch.float32)
    wanted = (values.float() - zeros.repeat_interleave(16, 1)) * scales.repeat_interleave(16, 1)
    assert torch.equal(found, wanted)


def test_a_convolution_keeps_its_axes() -> None:
    values = torch.randint(-127, 128, (6, 4, 3, 3), dtype=torch.int8)
    scales = torch.rand(6, 1)
    found = ops.dequantize(values, scales, None, None, 0, 0, "int8", torch.float32)
    assert torch.equal(found, values.float() * scales[:, :, None, None])


def test_scales_can_be_trained() -> None:
    values, scales, columns, group = _stored("int4")
    scales.requires_grad_()
    probe = torch.randn(8, columns)

    def loss(s: torch.Tensor) -> torch.Tensor:
        weight = ops.dequantize(values, s, None, None, columns, group, "int4", torch.float32)
        found: torch.Tensor = (weight * probe).sum()
        return found

    (grad,) = torch.autograd.grad(loss(scales), [scales])
    # Linear in the scales, so that differences are the derivative.
    step = torch.zeros_like(scales)
    step[2, 1] = 1.0
    assert torch.allclose(loss(scales + step) - loss(scales), grad[2, 1], rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["int8", "fp8"]), st.integers(0, 2**31))
def test_tokens_are_rounded_within_half_a_step(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 17, generator=generator, dtype=torch.float64)
    x[0, 0] = 0
    found = ops.quantize_dequantize_tokens(x, [-1], name)
    largest = x.abs().amax(-1, keepdim=True)
    # int8: half of a 127th; e4m3 has three bits behind the point, so that a 16th of the value
    # is half a step, and the least step is 2**-9 of 448.
    bound = largest / 254 if name == "int8" else x.abs() / 16 + largest / 448 * 2**-10
    assert bool(((found - x).abs() <= bound * (1 + 1e-9)).all())
    assert torch.equal(found[0, 0], x[0, 0])
    numbers, scales = ops.quantize_tokens(x.float(), name)
    assert torch.allclose(
        numbers.double() * scales[..., None].double(), found, rtol=2e-2, atol=2e-2
    )


def test_rounding_passes_gradients_straight_through() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    ops.quantize_dequantize_tokens(x, [-1], "int8").sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    torch.library.opcheck(ops.quantize_dequantize_tokens.default, (x, [-1], "int8"))


def test_numbers_of_four_bits_are_no_activations() -> None:
    with pytest.raises(OptionError, match="activations have 8 bits"):
        op.quantize_tokens(torch.randn(2, 4), "int4")
