"""Triton's interpreter against the reference, the plain form and the PTX (see ptx.py)."""

from typing import Any

import pytest
import torch

from tests.kernels.making import relative, w4
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a16 import op as w4a16

# The sums are the reference's, in another order; what differs is the rounding of the result:
# to nearest in fp16; in the interpreter's bf16 by truncation, which is up to twice as far.
TOLERANCE = {torch.float16: 2**-11, torch.bfloat16: 2**-7}

CASES: dict[str, Any] = {
    "one-token": (1, 64, 256, 128, False, torch.float16, Tile(2, 64)),
    "ragged": (3, 100, 200, 128, False, torch.float16, Tile(8, 64)),
    "two-tiles-of-tokens": (17, 130, 512, 128, True, torch.float16, Tile(16, 128)),
    "split": (5, 64, 1024, 128, True, torch.float16, Tile(8, 64, 2)),
    "split-unevenly": (5, 64, 768, 128, False, torch.float16, Tile(8, 64, 2)),
    "quarter-of-32": (5, 64, 384, 128, True, torch.float16, Tile(8, 64)),
    "group-64": (5, 64, 256, 64, True, torch.float16, Tile(8, 64)),
    "group-32": (5, 64, 128, 32, True, torch.float16, Tile(8, 64)),
    "whole-rows": (5, 64, 512, 0, True, torch.float16, Tile(8, 64, 2)),
    "bf16": (5, 64, 256, 64, True, torch.bfloat16, Tile(8, 64)),
    "bf16-128": (5, 100, 200, 128, False, torch.bfloat16, Tile(8, 64)),
}


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "ptx"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_against_reference(case: str, fast: bool) -> None:
    m, n, k, group, zeros, dtype, tile = CASES[case]
    weight = w4(n, k, group, zeros, dtype)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    residual = torch.randn(m, n).to(dtype)
    options: dict[str, Any] = {
        "bias": bias,
        "residual": residual,
        "out_features": n,
        "group": group,
    }
    options["activation"] = "silu"
    found = w4a16.launch(x, weight, tile, fast=fast, wide=dtype == torch.bfloat16, **options)
    wanted = w4a16.reference(x, *weight, **options)
    assert relative(found, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_epilogues(activation: str) -> None:
    weight = w4(64, 128, 128, False, torch.float16)
    x = torch.randn(2, 128).half()
    options: dict[str, Any] = {"out_features": 64, "group": 128, "activation": activation}
    found = w4a16.launch(x, weight, Tile(8, 64), **options)
    assert relative(found, w4a16.reference(x, *weight, **options)) < TOLERANCE[torch.float16]


def test_a_wrong_weight_is_noticed() -> None:
    """The negative control: one bit of one word is more than the tolerance."""
    weight = w4(64, 128, 128, False, torch.float16)
    x = torch.randn(2, 128).half()
    wrong = weight._replace(words=weight.words.clone())
    wrong.words[3, 7] ^= 8
    options: dict[str, Any] = {"out_features": 64, "group": 128}
    found = w4a16.launch(x, wrong, Tile(8, 64), **options)
    assert relative(found, w4a16.reference(x, *weight, **options)) > TOLERANCE[torch.float16]


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_unpacking(group: int) -> None:
    weight = w4(100, 300, group, True, torch.float16)
    found = w4a16.unpacked(weight, group, torch.float16, wrap=lambda kernel: kernel)
    assert torch.equal(found, w4a16.dequantised(*weight, group).half())


@pytest.mark.parametrize("split", [1, 2])
def test_low_rank_residual(split: int) -> None:
    weight = w4(100, 512, 128, False, torch.float16)
    x = torch.randn(5, 512).half()
    down, up = w4a16.pad_rank(torch.randn(9, 512).half() / 20, torch.randn(100, 9).half())
    narrow = torch.nn.functional.linear(x, down)
    options: dict[str, Any] = {"out_features": 100, "group": 128}
    found = w4a16.launch(x, weight, Tile(8, 64, split), low_rank=(narrow, up), **options)
    wanted = w4a16.reference(x.double(), *weight, **options)
    wanted += narrow.double() @ up[:100].double().T
    assert relative(found, wanted) < TOLERANCE[torch.float16]
