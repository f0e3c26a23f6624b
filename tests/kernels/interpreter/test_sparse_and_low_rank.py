"""The block-sparse and the low-rank kernels in Triton's interpreter against their references."""

from typing import Any

import pytest
import torch

from tests.kernels.making import blocks, relative
from torchlathe.kernels.block_sparse import op as block_sparse
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.tuning.tiles import Tile

HALF, BRAIN = torch.float16, torch.bfloat16
# The interpreter truncates in bf16.
TOLERANCE = {HALF: 2**-11, BRAIN: 2**-7}


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("n", "k", "size", "split"), [(100, 200, 64, 1), (130, 700, 64, 2), (200, 300, 128, 1)], ids=str
)
def test_block_sparse(n: int, k: int, size: int, split: int, dtype: torch.dtype) -> None:
    weight = blocks(n, k, size, dtype)
    x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((9, k), (n,), (9, n)))
    options: dict[str, Any] = {"bias": bias, "residual": residual, "out_features": n}
    options["activation"] = "gelu"
    tile = Tile(16, size, split)
    found = block_sparse.launch(x, weight, tile, wide=dtype == BRAIN, **options)
    wanted = block_sparse.reference(x, *weight, **options)
    assert relative(found, wanted) < TOLERANCE[dtype]


def test_a_gated_block_sparse_layer() -> None:
    weight, x = blocks(112, 200, 64, HALF), torch.randn(9, 200).half()
    options: dict[str, Any] = {"out_features": 50, "activation": "swiglu"}
    for split in (1, 2):
        found = block_sparse.launch(x, weight, Tile(16, 64, split), **options)
        assert relative(found, block_sparse.reference(x, *weight, **options)) < 2**-11


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "split"),
    [(3, 100, 200, 9, 1), (9, 130, 512, 70, 4), (17, 64, 300, 64, 2)],
    ids=str,
)
def test_low_rank(m: int, n: int, k: int, rank: int, split: int, dtype: torch.dtype) -> None:
    down, up = (torch.randn(rank, k) / 20).to(dtype), torch.randn(n, rank).to(dtype)
    factors = low_rank.pack(down, up)
    x, bias, residual = (torch.randn(*shape).to(dtype) for shape in ((m, k), (n,), (m, n)))
    options: dict[str, Any] = {"bias": bias, "residual": residual, "out_features": n}
    options["activation"] = "silu"
    tile = Tile(8, 64, split)
    found = low_rank.launch(x, factors, tile, wide=dtype == BRAIN, **options)
    wanted = low_rank.reference(x.double(), *factors, **options)
    # The narrow product is rounded too.
    assert relative(found, wanted) < 2 * TOLERANCE[dtype]
