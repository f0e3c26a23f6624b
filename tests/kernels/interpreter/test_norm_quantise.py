import pytest
import torch

from tests.kernels.making import relative
from torchlathe.kernels.dequantize import op as _registers  # noqa: F401
from torchlathe.kernels.norm_quantise import op as norm

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("mean", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(("rows", "width", "each"), [(3, 64, 1), (5, 100, 2), (1, 256, 4)])
def test_kernel_against_reference(rows, width, each, mean, dtype) -> None:
    x, residual = torch.randn(rows, width).half() * 3, torch.randn(rows, width).half()
    weight, bias = torch.rand(width).half(), torch.randn(width).half() if mean else None
    found = norm.launch(x, residual, weight, bias, 1e-5, mean=mean, dtype=dtype, each=each)
    summed = (x.float() + residual.float()).half()
    wanted = norm.reference(summed, weight, bias, 1e-5, mean=mean, dtype=dtype)
    assert torch.equal(found[2], summed)
    assert relative(found[1], wanted[1]) < 1e-6
    steps = (found[0].double() - wanted[0].double()).abs()
    if dtype == torch.int8:
        # A number half way between two may go either way by the last bit of fp32.
        assert steps.max() <= 1
        assert steps.count_nonzero() <= 0.01 * steps.numel()
    else:
        # The interpreter loses the carry where rounding reaches a power of two, and half of it is
        # left; among subnormals it is off by a step.
        lost = 2 * found[0].double() == wanted[0].double()
        assert torch.all(lost | (steps <= 2.0**-9))
        assert lost.sum() <= 0.05 * lost.numel()


def test_zeros() -> None:
    numbers, scales, _ = norm.launch(
        torch.zeros(2, 64), None, torch.ones(64), None, 1e-5, mean=False, dtype=torch.int8
    )
    assert not numbers.any()
    assert scales.isfinite().all()


@pytest.mark.parametrize(("rows", "width"), [(3, 64), (2, 100)])
def test_rows_as_they_are(rows: int, width: int) -> None:
    """By the same kernel, against what `quantize_tokens` does on a CPU."""
    x = torch.randn(rows, width).half() * 3
    x[0] = 0
    numbers, scales = norm.quantise_rows(x, torch.int8, wrap=lambda kernel: kernel)
    wanted = torch.ops.torchlathe.quantize_tokens(x, "int8")
    assert relative(scales, wanted[1]) < 1e-6
    steps = (numbers.int() - wanted[0].int()).abs()
    assert steps.max() <= 1
    assert steps.count_nonzero() <= 0.02 * steps.numel()
