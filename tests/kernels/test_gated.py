# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
"""Gated MLPs: the rows of a gate and of what it gates in one product."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import eight_bits, relative
from torchlathe.ir import OptionError
from torchlathe.kernels.epilogue import GATED, finished, interleave, rows_for
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16

OF = {
    "bilinear": lambda gate: gate,
    "reglu": F.relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


@pytest.mark.parametrize("activation", OF)
@pytest.mark.parametrize("features", [8, 20, 64])
def test_the_end_is_the_gate_times_the_rest(features: int, activation: str) -> None:
    assert set(OF) == set(GATED)
    gate, gated = torch.randn(3, features).double(), torch.randn(3, features).double()
    bias, residual = torch.randn(2, features).double(), torch.randn(3, features).double()
    product = interleave(gate, gated, 1)
    assert product.shape[1] == rows_for(features, activation)
    found = finished(product, interleave(*bias), residual, activation, features)
    wanted = OF[activation](gate + bias[0]) * (gated + bias[1]) + residual
    assert torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)


def test_rows_take_turns_of_eight() -> None:
    gate, gated = torch.arange(20), 100 + torch.arange(20)
    found = interleave(gate, gated).tolist()
    assert found[:16] == [*range(8), *range(100, 108)]
    assert found[32:] == [16, 17, 18, 19, 0, 0, 0, 0, 116, 117, 118, 119, 0, 0, 0, 0]
    with pytest.raises(OptionError, match="cannot gate"):
        interleave(gate, gated[:3])


def layer(kind: str, features: int, k: int):
    """A call of the op on interleaved weights, and what it means, for activations x."""
    scales = torch.rand(2, features) * 0.01 + 0.01
    turned = interleave(scales[0], scales[1])
    if kind == "w4a16":
        values = torch.randint(0, 16, (2, features, k), dtype=torch.uint8)
        halves = (values.double() - 8) * scales.bfloat16().double()[..., None]
        packed = w4a16.pack(interleave(*values), turned[None].bfloat16(), None, 0)
        op, rest = torch.ops.torchlathe.w4a16_linear, (None, None, features, 0, "swiglu")
        return lambda x: op(x, *packed, *rest), halves
    if kind == "w8a16":
        values = torch.randint(-127, 128, (2, features, k), dtype=torch.int8)
        halves = values.double() * scales.bfloat16().double()[..., None]
        packed = w8a16.pack(interleave(*values), turned[None].bfloat16())
        return lambda x: w8a16.w8a16_linear(x, *packed, None, None, features, "swiglu"), halves
    least = -127 if kind == "w8a8" else -8
    values = torch.randint(least, -least, (2, features, k), dtype=torch.int8)
    halves = values.double() * scales.double()[..., None]
    ends = (None, None, features, torch.bfloat16, "swiglu")
    if kind == "w8a8":
        rows = w8a8.pack(interleave(*values), turned)
        return lambda x: w8a8.w8a8_linear(*x, *rows, *ends), halves
    signed = w4a8.pack(interleave(*values), turned[None])
    return lambda x: w4a8.w4a8_linear(*x, *signed, *ends), halves


@pytest.mark.parametrize("kind", ["w4a16", "w8a16", "w8a8", "w4a8"])
@pytest.mark.parametrize(("features", "k"), [(64, 128), (100, 200)])
def test_ops_on_a_cpu(features: int, k: int, kind: str) -> None:
    call, (gate, gated) = layer(kind, features, k)
    if kind.endswith("a16"):
        x = torch.randn(2, 3, k).bfloat16()
        wide = x.double()
        found = call(x)
    else:
        x, x_scales = eight_bits(6, k).view(2, 3, k), torch.rand(2, 3)
        wide = x.double() * x_scales.double()[..., None]
        found = call((x, x_scales))
    wanted = F.silu(wide @ gate.T) * (wide @ gated.T)
    assert found.shape == (2, 3, features)
    # Weights and both products are rounded to bf16 where activations have 16 bits.
    assert relative(found, wanted) < 4 * torch.finfo(torch.bfloat16).eps


def test_opcheck() -> None:
    values = torch.randint(0, 16, (48, 128), dtype=torch.uint8)
    packed = w4a16.pack(values, torch.rand(1, 48).bfloat16(), None, 0)
    x, bias, residual = (torch.randn(*s).bfloat16() for s in ((3, 128), (48,), (3, 20)))
    args = (x, *packed, bias, residual, 20, 0, "geglu")
    torch.library.opcheck(torch.ops.torchlathe.w4a16_linear.default, args)
    rows = w8a8.pack(eight_bits(48, 128), torch.rand(48))
    args = (eight_bits(3, 128), torch.rand(3), *rows, bias, residual, 20, torch.bfloat16, "swiglu")
    torch.library.opcheck(torch.ops.torchlathe.w8a8_linear.default, args)
