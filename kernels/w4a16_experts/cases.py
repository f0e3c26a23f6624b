"""The specialisations of W4A16 for experts that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import product_case
from torchlathe.kernels.w4a16.cases import w4a16_format

__all__ = ["cases"]


def _case(BM: int, BN: int, *, dtype: str = "fp16", activation: int = 0, limit: float) -> Case:
    return product_case(
        "w4a16_experts",
        f"{dtype} g128 BM{BM} BN{BN} warps4 stages4" + " gated" * (activation >= 16),
        w4a16_format(dtype),
        BM,
        BN,
        limit=limit,
        group=128,
        experts=True,
        activation=activation,
        others={"gfx942": {"mfma"}},
        conversions=0,
    )


def cases() -> Iterator[Case]:
    """Each tile that is used, bf16, and a gate."""
    yield _case(8, 64, limit=2.6)
    yield _case(16, 128, limit=2.6)
    yield _case(32, 128, limit=2.8)
    yield _case(8, 64, dtype="bf16", limit=2.6)
    yield _case(16, 128, activation=18, limit=2.6)
