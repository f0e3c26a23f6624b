import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.kernels.making import relative
from torchlathe.ir import OptionError
from torchlathe.kernels.norm_quantise import op as norm

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("mean", [False, True], ids=["rms", "layer"])
def test_against_the_norm_in_float64(mean: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 300) * 3 + 1, torch.rand(300) + 0.5
    bias = torch.randn(300) if mean else None
    if bias is not None:
        wanted = F.layer_norm(x.double(), (300,), weight.double(), bias.double(), 1e-5)
    else:
        wanted = F.rms_norm(x.double(), (300,), weight.double(), 1e-5)
    numbers, scales = norm.norm_quantise(x, weight, bias, 1e-5, mean, dtype)
    assert (numbers.dtype, scales.dtype) == (dtype, torch.float32)
    found = numbers.double() * scales.double()[:, None]
    largest = wanted.abs().amax(1, keepdim=True)
    # int8 is off by half a step of 1/127; e4m3 has three bits, so by half of 1/8 of the number.
    bound = largest / 254 if dtype == torch.int8 else wanted.abs() / 16 + largest / 448 / 512
    assert torch.all((found - wanted).abs() <= bound * (1 + 1e-5))
    assert torch.allclose(scales.double(), largest[:, 0] / norm._LARGEST[dtype], rtol=1e-5)


@given(st.integers(1, 6), st.integers(1, 70), st.floats(-12, 12), st.integers(0, 999))
def test_the_largest_number_is_used(rows: int, width: int, power: float, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10**power
    numbers, scales = norm.norm_quantise(x, torch.ones(width), None, 0.0, False, torch.int8)
    assert torch.all(numbers.abs().amax(1) == 127)
    assert torch.all(scales.isfinite())
    # RMSNorm does not see the scale of its input.
    again, _ = norm.norm_quantise(x * 2, torch.ones(width), None, 0.0, False, torch.int8)
    assert torch.equal(numbers, again)


def test_a_row_of_zeros() -> None:
    for mean in (False, True):
        numbers, scales = norm.norm_quantise(
            torch.zeros(2, 8), torch.ones(8), None, 1e-5, mean, torch.int8
        )
        assert not numbers.any()
        assert scales.isfinite().all()


def test_with_a_residual() -> None:
    x, residual = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    weight = torch.rand(64).bfloat16()
    numbers, scales, summed = norm.add_norm_quantise(
        x, residual, weight, None, 1e-6, False, torch.int8
    )
    assert torch.equal(summed, x + residual)
    assert numbers.shape == (2, 3, 64)
    assert scales.shape == (2, 3)
    wanted = norm.norm_quantise(summed, weight, None, 1e-6, False, torch.int8)
    assert torch.equal(numbers, wanted[0])
    assert relative(scales, wanted[1]) == 0


def test_opcheck() -> None:
    ops = torch.ops.torchlathe
    x, weight, bias = torch.randn(3, 64).bfloat16(), torch.rand(64), torch.rand(64)
    torch.library.opcheck(ops.norm_quantise.default, (x, weight, bias, 1e-5, True, torch.int8))
    args = (x, x.clone(), weight, None, 1e-5, False, FP8)
    torch.library.opcheck(ops.add_norm_quantise.default, args)


def test_another_type_is_refused() -> None:
    with pytest.raises(OptionError, match="cannot quantise to int16"):
        norm.norm_quantise(torch.ones(1, 8), torch.ones(8), None, 0.0, False, torch.int16)
