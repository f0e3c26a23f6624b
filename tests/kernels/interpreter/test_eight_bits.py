"""W8A16, W8A8 and W4A8 in Triton's interpreter against their references."""

from typing import Any

import pytest
import torch

from tests.kernels.making import eight_bits, relative, w4_signed, w8, w8_rows
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16

HALF, BRAIN, FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn

W8: dict[str, Any] = {
    "ragged": (3, 100, 200, 0, HALF, Tile(8, 64)),
    "groups": (17, 130, 256, 128, HALF, Tile(16, 128)),
    "split": (5, 64, 512, 128, HALF, Tile(8, 64, 2)),
    "bf16": (5, 64, 256, 0, BRAIN, Tile(8, 64)),
}
INTEGERS: dict[str, Any] = {
    "ragged": (3, 100, 200, 0, Tile(8, 64)),
    "groups": (17, 130, 256, 128, Tile(16, 128)),
    "groups-half-of-64": (5, 64, 384, 128, Tile(16, 64)),
    "split": (5, 64, 1024, 0, Tile(8, 64, 2)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "ptx"])
@pytest.mark.parametrize("case", W8)
def test_w8a16(case: str, fast: bool) -> None:
    m, n, k, group, dtype, tile = W8[case]
    weight = w8(n, k, group, dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    options: dict[str, Any] = {"bias": bias, "out_features": n, "activation": "silu"}
    found = w8a16.launch(x, weight, tile, fast=fast, wide=dtype == BRAIN, **options)
    wanted = w8a16.reference(x, *weight, **options)
    # Only the rounding of the result differs; the interpreter truncates in bf16.
    assert relative(found, wanted) < (2**-11 if dtype == HALF else 2**-7)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "ptx"])
@pytest.mark.parametrize("case", INTEGERS)
def test_w4a8(case: str, fast: bool) -> None:
    m, n, k, group, tile = INTEGERS[case]
    weight, x, x_scales = w4_signed(n, k, group), eight_bits(m, k), torch.rand(m)
    bias, residual = torch.randn(n), torch.randn(m, n)
    options: dict[str, Any] = {
        "bias": bias,
        "residual": residual,
        "out_features": n,
        "dtype": torch.float32,
    }
    found = w4a8.launch(x, x_scales, weight, tile, fast=fast, **options)
    wanted = w4a8.reference(x, x_scales, *weight, **options | {"dtype": torch.float64})
    assert relative(found, wanted) < 1e-6  # exact sums, scaled in fp32


@pytest.mark.parametrize("case", [c for c in INTEGERS if "half" not in c])
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
def test_w8a8(dtype: torch.dtype, case: str) -> None:
    m, n, k, _, tile = INTEGERS[case]
    weight, x, x_scales = w8_rows(n, k, dtype), eight_bits(m, k, dtype), torch.rand(m)
    options: dict[str, Any] = {"bias": torch.randn(n), "out_features": n, "dtype": torch.float32}
    found = w8a8.launch(x, x_scales, weight, tile, **options)
    wanted = w8a8.reference(x, x_scales, *weight, **options | {"dtype": torch.float64})
    assert relative(found, wanted) < 1e-6


def test_a_wrong_weight_is_noticed() -> None:
    weight, x, x_scales = w4_signed(64, 128, 0), eight_bits(2, 128), torch.rand(2)
    weight.packed[3, 7] ^= 16
    options: dict[str, Any] = {"out_features": 64, "dtype": torch.float32}
    found = w4a8.launch(x, x_scales, weight, Tile(8, 64), **options)
    weight.packed[3, 7] ^= 16
    assert relative(found, w4a8.reference(x, x_scales, *weight, **options)) > 1e-6


@pytest.mark.parametrize("group", [0, 128])
def test_unpacking(group: int) -> None:
    weight = w8(100, 300, group, HALF)
    found = w8a16.unpacked(weight, HALF, wrap=lambda kernel: kernel)
    assert torch.equal(found, w8a16.dequantised(*weight).half())
