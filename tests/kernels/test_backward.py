"""What trains around quantised weights: gradients of activations, bias and residual."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import relative, w4, w8
from torchlathe.ir import UnsupportedError
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a16 import op as w8a16


def gradients(call, tensors):
    for tensor in tensors:
        tensor.grad = None
    call().square().sum().backward()
    return [tensor.grad.clone() for tensor in tensors]


@pytest.mark.parametrize("kind", ["w4a16", "w8a16"])
def test_gradients_are_those_of_the_dequantised_layer(kind: str) -> None:
    n, k = 100, 200
    x, bias, residual = (
        torch.randn(*shape, requires_grad=True) for shape in ((2, 3, k), (n,), (2, 3, n))
    )
    if kind == "w4a16":
        four = w4(n, k, 64, True, torch.float32)
        weight = w4a16.dequantised(*four, 64)

        def ours() -> torch.Tensor:
            return w4a16.w4a16_linear(x, *four, bias, residual, n, 64)
    else:
        eight = w8(n, k, 128, torch.float32)
        weight = w8a16.dequantised(*eight)

        def ours() -> torch.Tensor:
            return w8a16.w8a16_linear(x, *eight, bias, residual, n)

    found = gradients(ours, (x, bias, residual))
    weight = weight[:n, :k]
    wanted = gradients(lambda: F.linear(x, weight, bias) + residual, (x, bias, residual))
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-6  # the same products in fp32, in another order


def test_opcheck_with_gradients() -> None:
    packed = w4(32, 128, 128, False, torch.float32)
    x = torch.randn(4, 128, requires_grad=True)
    torch.library.opcheck(
        torch.ops.torchlathe.w4a16_linear.default, (x, *packed, None, None, 32, 128)
    )


def test_fused_activations_have_none() -> None:
    packed = w4(32, 128, 128, False, torch.float32)
    x = torch.randn(4, 128, requires_grad=True)
    y = w4a16.w4a16_linear(x, *packed, None, None, 32, 128, "silu")
    with pytest.raises(UnsupportedError, match="no backward through the fused activation 'silu'"):
        y.sum().backward()
