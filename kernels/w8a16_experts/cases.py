"""The specialisations of W8A16 for experts that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import product_case
from torchlathe.kernels.w8a16.cases import w8a16_format

__all__ = ["cases"]


def _case(BM: int, BN: int, *, dtype: str = "fp16", limit: float) -> Case:
    return product_case(
        "w8a16_experts",
        f"{dtype} gK BM{BM} BN{BN} warps4 stages4",
        w8a16_format(dtype),
        BM,
        BN,
        limit=limit,
        experts=True,
        conversions=0,
    )


def cases() -> Iterator[Case]:
    """Each tile that is used; the formats of numbers are those of W8A16."""
    yield _case(8, 64, limit=3.2)
    yield _case(16, 128, limit=3.2)
    yield _case(32, 128, dtype="bf16", limit=3.5)
