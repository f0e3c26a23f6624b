from typing import Any

import pytest
import torch

from tests.kernels.making import relative
from tests.kernels.test_experts import layer
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a16_experts import op

experts: Any = op  # weights are passed by unpacking, which a checker cannot count


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "ptx"])
@pytest.mark.parametrize(
    ("counts", "n", "k", "group", "zeros"),
    [([3, 0, 9], 100, 200, 128, True), ([0, 1], 64, 256, 64, False), ([17], 64, 128, 0, True)],
    ids=["ragged", "empty-expert", "one-expert"],
)
def test_kernel_against_reference(counts, n, k, group, zeros, fast) -> None:
    weight, offsets, x, order, weights = layer(counts, n, k, group, zeros, torch.float16)
    options: dict[str, Any] = {"out_features": n, "group": group, "activation": "silu"}
    found = experts.launch(
        x, order, offsets, weight, Tile(8, 64), weights=weights, fast=fast, **options
    )
    wanted = experts.reference(x, order, offsets, *weight, weights, **options)
    assert relative(found, wanted) < 2**-11  # the result's rounding to fp16
