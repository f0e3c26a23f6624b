# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
"""Low-rank terms beside quantised weights, and the product of two factors alone."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import (
    eight_bits,
    relative,
    w4,
    w4_centred,
    w4_for_floats,
    w4_signed,
    w8,
    w8_rows,
)
from torchlathe.ir import OptionError
from torchlathe.kernels.blocks.launching import pad_rank
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16

BRAIN = torch.bfloat16
N, K, RANK = 100, 200, 9


def factors(dtype: torch.dtype = BRAIN) -> tuple[torch.Tensor, torch.Tensor]:
    return (torch.randn(RANK, K) / 20).to(dtype), torch.randn(N, RANK).to(dtype)


def test_w8a16() -> None:
    x, bias, (down, up) = torch.randn(4, K).to(BRAIN), torch.randn(N).to(BRAIN), factors()
    packed = w8(N, K, 128, BRAIN)
    args = (x, *packed, *pad_rank(down, up), bias, None, N, "silu")
    found = torch.ops.torchlathe.w8a16_low_rank_linear(*args)
    wanted = w8a16.reference(x.double(), *packed, out_features=N)
    wanted = F.silu(wanted + x.double() @ down.double().T @ up.double().T + bias.double())
    # The narrow product, the weights and the result are each rounded to bf16.
    assert relative(found, wanted) < 4 * torch.finfo(BRAIN).eps
    torch.library.opcheck(torch.ops.torchlathe.w8a16_low_rank_linear.default, args)


@pytest.mark.parametrize("kind", ["w8a8", "w4a8", "w4a8-zeros", "w4a8-fp8"])
def test_eight_bit_activations(kind: str) -> None:
    dtype = torch.float8_e4m3fn if kind.endswith("fp8") else torch.int8
    x, x_scales = eight_bits(4, K, dtype), torch.rand(4)
    narrow, up = torch.randn(4, RANK).to(BRAIN), factors()[1]
    wide, tall = F.pad(narrow, (0, 16 - RANK)), F.pad(up, (0, 16 - RANK, 0, 28))
    zeros = None
    if kind == "w8a8":
        packed: Any = w8_rows(N, K)
        wanted = w8a8.reference(x, x_scales, *packed, out_features=N)
    elif kind == "w4a8-zeros":
        packed = w4_centred(N, K, 128)
        wanted = w4a8.reference(x, x_scales, *packed, out_features=N)
        packed, zeros = packed[:2], packed.zeros
    else:
        packed = w4_for_floats(N, K, 128) if kind == "w4a8-fp8" else w4_signed(N, K, 128)
        wanted = w4a8.reference(x, x_scales, *packed, out_features=N)
    args: Any = (x, x_scales, *packed, wide, tall, None, None, N, torch.float32, "none")
    if kind == "w8a8":
        op = torch.ops.torchlathe.w8a8_low_rank_linear
    else:
        op, args = torch.ops.torchlathe.w4a8_low_rank_linear, (*args, zeros)
    wanted = wanted + narrow.double() @ up.double().T
    # The term is rounded to bf16, and is a small part of the sum.
    assert relative(op(*args), wanted) < torch.finfo(BRAIN).eps
    if kind in {"w8a8", "w4a8-zeros"}:  # the check itself multiplies, which fp8 has no kernel for
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("kind", ["zeros", "fp8"])
def test_w4a8_with_zero_points_and_with_floats(kind: str, group: int) -> None:
    groups = 1 if group == 0 else 2
    of = torch.arange(K) // (group or K)
    scales = torch.rand(groups, N) + 0.1
    x_scales = torch.rand(5)
    if kind == "zeros":
        x = eight_bits(5, K)
        values = torch.randint(0, 16, (N, K), dtype=torch.uint8)
        zeros = torch.randint(0, 16, (groups, N), dtype=torch.uint8)
        centred = values.double() - zeros[of].T.double()
        packed: Any = w4a8.pack_centred(values, scales, zeros, group)
        assert torch.equal(w4a8.numbers(packed.packed, packed.zeros)[:N, :K].double(), centred)
        found = w4a8.w4a8_linear(
            x, x_scales, *packed[:2], None, None, N, torch.float32, "none", packed.zeros
        )
    else:
        x = eight_bits(5, K, torch.float8_e4m3fn)
        values = torch.randint(-7, 8, (N, K), dtype=torch.int8)
        centred = values.double()
        packed = w4a8.pack(values, scales, group, torch.float8_e4m3fn)
        found = w4a8.w4a8_linear(x, x_scales, *packed, None, None, N, torch.float32)
    wanted = (x.double() * x_scales.double()[:, None]) @ (centred * scales[of].T.double()).T
    assert relative(w4a8.reference(x, x_scales, *packed, out_features=N), wanted) < 1e-12
    assert relative(found, wanted) < 1e-6  # sums in fp32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: w4_for_floats(2, 2, 64), "groups of 64"),
        (
            lambda: w4a8.pack(
                torch.full((2, 2), -8).char(), torch.ones(1, 2), 0, torch.float8_e4m3fn
            ),
            "from -7 to 7",
        ),
        (
            lambda: w4a8.pack(torch.zeros(2, 2).char(), torch.ones(1, 2), 0, BRAIN),
            "no layout for activations of bfloat16",
        ),
        (
            lambda: w4a8.pack_centred(
                torch.full((2, 2), 16).byte(), torch.ones(1, 2), torch.zeros(1, 2).byte()
            ),
            "below 16",
        ),
        (
            lambda: w4a8.pack_centred(
                torch.zeros(2, 2).char(), torch.ones(1, 2), torch.zeros(1, 2).byte()
            ),
            "must be uint8",
        ),
        (lambda: low_rank.pack(torch.ones(3, 8), torch.ones(8, 4)), "have no product"),
    ],
    ids=["group", "fp8-range", "type", "range", "sign", "ranks"],
)
def test_what_cannot_be_packed_is_refused(call, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, BRAIN], ids=["fp16", "bf16"])
def test_factors_alone(dtype: torch.dtype) -> None:
    down, up = factors(dtype)
    packed = low_rank.pack(down, up)
    assert packed.down.shape == (64, 256)
    assert packed.up.shape == (128, 64)
    x, residual = torch.randn(2, 3, K).to(dtype), torch.randn(2, 3, N).to(dtype)
    bias = torch.randn(N).to(dtype)
    args = (x, *packed, bias, residual, N, "gelu")
    found = torch.ops.torchlathe.low_rank_linear(*args)
    wanted = F.gelu(x.double() @ down.double().T @ up.double().T + bias.double())
    wanted = wanted + residual.double()
    assert relative(found, wanted) < 3 * torch.finfo(dtype).eps
    exact = low_rank.reference(
        x.double(), *packed, bias, residual, out_features=N, activation="gelu"
    )
    assert relative(exact, wanted) < 1e-12
    torch.library.opcheck(torch.ops.torchlathe.low_rank_linear.default, args)


@pytest.mark.parametrize("kind", ["alone", "w4a16", "w8a16"])
def test_gradients_of_factors(kind: str) -> None:
    x = torch.randn(2, 3, K, requires_grad=True)
    down, up = (tensor.requires_grad_() for tensor in factors(torch.float32))
    weight = torch.zeros(N, K)
    if kind == "alone":
        packed: Any = low_rank.pack(down, up)
        found = low_rank.low_rank_linear(x, *packed, None, None, N)
    elif kind == "w4a16":
        four = w4(N, K, 64, True, torch.float32)
        weight = w4a16.dequantised(*four, 64)[:N, :K]
        packed = pad_rank(down, up)
        found = w4a16.w4a16_low_rank_linear(x, *four, *packed, None, None, N, 64)
    else:
        eight = w8(N, K, 0, torch.float32)
        weight = w8a16.dequantised(*eight)[:N, :K]
        packed = pad_rank(down, up)
        found = w8a16.w8a16_low_rank_linear(x, *eight, *packed, None, None, N)
    ours = torch.autograd.grad(found.square().sum(), (x, down, up))
    plain = (F.linear(x, weight) + F.linear(F.linear(x, down), up)).square().sum()
    for one, other in zip(ours, torch.autograd.grad(plain, (x, down, up)), strict=True):
        assert relative(one, other) < 1e-5  # the same products in fp32, in another order
