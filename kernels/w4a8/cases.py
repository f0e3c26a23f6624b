"""The specialisations of the W4A8 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from torchlathe.kernels.aot.matrix import Case
from torchlathe.kernels.blocks.cases import Format, product_case
from torchlathe.kernels.w8a8.cases import WHERE

__all__ = ["cases"]


def _case(
    BM: int,
    BN: int,
    *,
    kind: str = "i8",
    group: int = 0,
    half: int = 128,
    zeros: bool = False,
    split: int = 1,
    rank: int = 0,
    warps: int = 4,
    limit: float,
) -> Case:
    name = f"g{group or 'K'} half{half} BM{BM} BN{BN} warps{warps} stages4"
    name = "fp8 " * (kind != "i8") + name + f" split{split}" * (split > 1)
    return product_case(
        "w4a8",
        name + " zeros" * zeros + f" rank{rank}" * (rank > 0),
        Format(3, "i8", kind, "fp32", "bf16", half, 2, 1, half),
        BM,
        BN,
        limit=limit,
        group=group,
        zeros=zeros,
        split=split,
        rank=rank,
        warps=warps,
        architectures=WHERE[kind],
    )


def cases() -> Iterator[Case]:
    """Each tile of the shipped table, with a scale per row and with groups."""
    yield _case(8, 64, limit=1.0)
    yield _case(8, 128, limit=1.0)
    yield _case(16, 128, limit=1.0)
    yield _case(16, 128, split=4, limit=1.0)
    yield _case(16, 128, half=64, limit=1.2)
    yield _case(32, 128, limit=1.2)
    yield _case(64, 128, warps=8, limit=1.6)
    yield _case(16, 128, group=128, limit=1.8)
    yield _case(16, 128, group=128, half=64, limit=1.8)
    yield _case(16, 128, rank=64, limit=1.0)
    # Zero points are taken away in registers, two more instructions for four weights.
    yield _case(16, 128, zeros=True, limit=1.8)
    yield _case(16, 128, group=128, zeros=True, limit=2.0)
    yield _case(16, 128, kind="fp8e4nv", limit=1.6)
    yield _case(16, 128, kind="fp8e4nv", group=128, limit=1.8)
