"""The specialisations of W8A8 for experts that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import product_case
from torchlathe.kernels.w8a8.cases import PRODUCTS, WHERE, w8a8_format

__all__ = ["cases"]


def _case(BM: int, BN: int, *, kind: str = "i8", limit: float) -> Case:
    return product_case(
        "w8a8_experts",
        f"{'int8' if kind == 'i8' else 'fp8'} BM{BM} BN{BN} warps4 stages4",
        w8a8_format(kind),
        BM,
        BN,
        limit=limit,
        experts=True,
        hopper=PRODUCTS,
        architectures=WHERE[kind],
    )


def cases() -> Iterator[Case]:
    """Each tile that is used."""
    yield _case(8, 64, limit=1.5)
    yield _case(16, 128, limit=1.5)
    yield _case(32, 128, limit=2.0)
    yield _case(16, 128, kind="fp8e4nv", limit=1.5)
