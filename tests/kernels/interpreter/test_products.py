# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
"""Gated ends, low-rank terms, zero points and experts of all formats in Triton's interpreter."""

from typing import Any

import pytest
import torch

from tests.kernels.making import (
    eight_bits,
    relative,
    routed,
    w4,
    w4_centred,
    w4_for_floats,
    w4_signed,
    w8,
    w8_rows,
)
from torchlathe.kernels.epilogue import rows_for
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a8_experts import op as w8a8_experts
from torchlathe.kernels.w8a16 import op as w8a16
from torchlathe.kernels.w8a16_experts import op as w8a16_experts

HALF, FP8 = torch.float16, torch.float8_e4m3fn


@pytest.mark.parametrize("activation", ["bilinear", "reglu", "swiglu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize("split", [1, 2])
def test_gated_w4a16(split: int, activation: str) -> None:
    features, k = 50, 512
    rows = rows_for(features, activation)
    weight = w4(rows, k, 128, False, HALF)
    x, bias = torch.randn(3, k).half(), torch.randn(rows).half()
    options: dict[str, Any] = {
        "bias": bias,
        "residual": torch.randn(3, features).half(),
        "out_features": features,
        "group": 128,
        "activation": activation,
    }
    found = w4a16.launch(x, weight, Tile(8, 64, split), **options)
    assert relative(found, w4a16.reference(x, *weight, **options)) < 2**-11


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("split", [1, 2])
def test_gated_w8a8(split: int, dtype: torch.dtype) -> None:
    features, k = 70, 256
    weight = w8_rows(rows_for(features, "swiglu"), k, dtype)
    x, x_scales = eight_bits(17, k, dtype), torch.rand(17) * 0.01
    options: dict[str, Any] = {"out_features": features, "activation": "swiglu"}
    options["dtype"] = torch.float32
    found = w8a8.launch(x, x_scales, weight, Tile(16, 128, split), **options)
    wanted = w8a8.reference(x, x_scales, *weight, **options | {"dtype": torch.float64})
    assert relative(found, wanted) < 1e-6


def term(tokens: int, n: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A low-rank term as the kernel takes it, and what it adds."""
    narrow, up = torch.randn(tokens, 16).half(), torch.zeros(128, 16).half()
    up[:n] = torch.randn(n, 16).half()
    return (narrow, up), narrow.double() @ up[:n].double().T


@pytest.mark.parametrize("split", [1, 2])
def test_low_rank_of_w8a16(split: int) -> None:
    weight, x = w8(100, 512, 0, HALF), torch.randn(5, 512).half()
    low_rank, added = term(5, 100)
    found = w8a16.launch(x, weight, Tile(8, 64, split), low_rank=low_rank, out_features=100)
    wanted = w8a16.reference(x.double(), *weight, out_features=100) + added
    assert relative(found, wanted) < 2**-11


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "ptx"])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("k", [256, 384])  # halves of 128 and of 64
@pytest.mark.parametrize("kind", ["signed", "zeros", "fp8"])
def test_w4a8_with_a_low_rank_term(kind: str, k: int, group: int, fast: bool) -> None:
    make = {"signed": w4_signed, "zeros": w4_centred, "fp8": w4_for_floats}[kind]
    weight = make(100, k, group)
    x, x_scales = eight_bits(5, k, FP8 if kind == "fp8" else torch.int8), torch.rand(5)
    low_rank, added = term(5, 100)
    found = w4a8.launch(
        x,
        x_scales,
        weight,
        Tile(8, 64),
        low_rank=low_rank,
        out_features=100,
        dtype=torch.float32,
        fast=fast,
    )
    wanted = w4a8.reference(x, x_scales, *weight, out_features=100) + added
    assert relative(found, wanted) < 1e-6


def test_low_rank_of_w8a8() -> None:
    weight, x, x_scales = w8_rows(100, 256), eight_bits(5, 256), torch.rand(5)
    low_rank, added = term(5, 100)
    options: dict[str, Any] = {"out_features": 100, "dtype": torch.float32}
    found = w8a8.launch(x, x_scales, weight, Tile(8, 64, 2), low_rank=low_rank, **options)
    wanted = w8a8.reference(x, x_scales, *weight, out_features=100) + added
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("counts", [[3, 0, 9], [17]], ids=["ragged", "one-expert"])
@pytest.mark.parametrize("kind", ["w8a16", "int8", "fp8"])
def test_experts(kind: str, counts: list[int]) -> None:
    n, k = 72, 200
    dtype = {"w8a16": HALF, "int8": torch.int8, "fp8": FP8}[kind]
    offsets, x, order, places, weights = routed(counts, k, dtype)
    options: dict[str, Any] = {"places": places, "out_features": n, "activation": "silu"}
    if kind == "w8a16":
        values = torch.randint(-127, 128, (len(counts), n, k), dtype=torch.int8)
        scales = torch.rand(len(counts), 2, n).half() * 0.01
        weight: Any = w8a16_experts.pack_experts(values, scales, 128)
        found = w8a16_experts.launch(
            x, order, offsets, weight, Tile(8, 64), weights=weights, **options
        )
        wanted = w8a16_experts.reference(x.double(), order, offsets, *weight, weights, **options)
        assert relative(found, wanted) < 2**-11
        return
    values = eight_bits(len(counts) * n, k, dtype).view(len(counts), n, k)
    weight = w8a8_experts.pack_experts(values, torch.rand(len(counts), n) * 0.01)
    x_scales = torch.rand(x.shape[0])
    found = w8a8_experts.launch(
        x,
        x_scales,
        order,
        offsets,
        weight,
        Tile(16, 128),
        weights=weights,
        dtype=torch.float32,
        **options,
    )
    wanted = w8a8_experts.reference(x, x_scales, order, offsets, *weight, weights, **options)
    assert relative(found, wanted) < 1e-6


def test_gated_experts() -> None:
    n, k = 40, 200
    offsets, x, order, _, _ = routed([3, 0, 9], k, HALF)
    values = torch.randint(-127, 128, (3, rows_for(n, "swiglu"), k), dtype=torch.int8)
    weight = w8a16_experts.pack_experts(values, torch.rand(3, 1, values.shape[1]).half() * 0.01)
    options: dict[str, Any] = {"out_features": n, "activation": "swiglu"}
    found = w8a16_experts.launch(x, order, offsets, weight, Tile(8, 64), **options)
    wanted = w8a16_experts.reference(x.double(), order, offsets, *weight, **options)
    assert relative(found, wanted) < 2**-11
