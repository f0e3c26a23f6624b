"""What trains around quantised weights: gradients of activations, bias and residual."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import relative, routed, w4, w8
from torchlathe.ir import UnsupportedError
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w4a16_experts import op as w4a16_experts
from torchlathe.kernels.w8a16 import op as w8a16
from torchlathe.kernels.w8a16_experts import op as w8a16_experts


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


@pytest.mark.parametrize("how", ["slots", "gathered", "placed"])
@pytest.mark.parametrize("kind", ["w4a16", "w8a16"])
def test_gradients_of_experts(kind: str, how: str) -> None:
    """Of the activations and of the router's weights, against autograd slot by slot."""
    n, k, counts = 100, 200, [3, 0, 5]
    offsets, x, order, places, weights = routed(counts, k, torch.float32)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    rest: tuple[int, ...]
    if kind == "w4a16":
        values = torch.randint(0, 16, (3, n, k), dtype=torch.uint8)
        packed: Any = w4a16_experts.pack_experts(values, torch.rand(3, 1, n) * 0.01, None, 0)
        op, rest = torch.ops.torchlathe.w4a16_experts_linear, (n, 0)
        each = [w4a16.dequantised(packed[0][e], packed[1][e], None, 0) for e in range(3)]
    else:
        values = torch.randint(-127, 128, (3, n, k), dtype=torch.int8)
        packed = w8a16_experts.pack_experts(values, torch.rand(3, 1, n) * 0.01)
        op, rest = torch.ops.torchlathe.w8a16_experts_linear, (n,)
        each = [w8a16.dequantised(packed[0][e], packed[1][e]) for e in range(3)]
    if how == "slots":
        x, order = torch.randn(sum(counts), k, requires_grad=True), None
    if how != "placed":
        places = None
    args: Any = (x, order, offsets, *packed, weights, *rest, "none", places)
    found = gradients(lambda: op(*args), (x, weights))
    expert_of = torch.arange(3).repeat_interleave(torch.tensor(counts))
    dense = torch.stack(each)[:, :n, :k][expert_of]

    def wanted() -> torch.Tensor:
        taken = x if order is None else x[order]
        out = (taken[:, None] @ dense.mT)[:, 0] * weights[:, None]
        return out if places is None else torch.empty_like(out).index_copy(0, places, out)

    for one, other in zip(found, gradients(wanted, (x, weights)), strict=True):
        assert relative(one, other) < 1e-5  # the same products in fp32, in another order
    if how == "placed":
        torch.library.opcheck(op.default, args)


def test_experts_that_no_slot_chose() -> None:
    values = torch.randint(0, 16, (2, 32, 128), dtype=torch.uint8)
    packed: Any = w4a16_experts.pack_experts(values, torch.rand(2, 1, 32), None, 0)
    x = torch.randn(0, 128, requires_grad=True)
    offsets = torch.zeros(3, dtype=torch.int32)
    op = torch.ops.torchlathe.w4a16_experts_linear
    y = op(x, None, offsets, *packed, None, 32, 0)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 128)


def test_experts_have_no_fused_activation_either() -> None:
    values = torch.randint(0, 16, (2, 32, 128), dtype=torch.uint8)
    packed: Any = w4a16_experts.pack_experts(values, torch.rand(2, 1, 32), None, 0)
    x = torch.randn(3, 128, requires_grad=True)
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    y = torch.ops.torchlathe.w4a16_experts_linear(x, None, offsets, *packed, None, 32, 0, "silu")
    with pytest.raises(UnsupportedError, match="no backward through the fused activation"):
        y.sum().backward()
