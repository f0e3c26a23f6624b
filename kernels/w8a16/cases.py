"""The specialisations of the W8A16 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlathe.kernels.aot.matrix import Case, Limits
from torchlathe.kernels.blocks.cases import Format, product_case

__all__ = ["cases", "w8a16_format"]


def w8a16_format(dtype: str = "fp16") -> Format:
    """W8A16 as the kernel knows it."""
    return Format(1, "i16", dtype, dtype, dtype, 64, 2, 2, 128)


def _case(
    BM: int,
    BN: int,
    *,
    dtype: str = "fp16",
    group: int = 0,
    split: int = 1,
    rank: int = 0,
    warps: int = 4,
    limit: float,
) -> Case:
    name = f"{dtype} g{group or 'K'} BM{BM} BN{BN} warps{warps} stages4"
    return product_case(
        "w8a16",
        name + f" split{split}" * (split > 1) + f" rank{rank}" * (rank > 0),
        w8a16_format(dtype),
        BM,
        BN,
        limit=limit,
        group=group,
        split=split,
        rank=rank,
        warps=warps,
        conversions=0,
    )


def _unpacking() -> Case:
    pointers = {"words_ptr": "*i16", "scales_ptr": "*fp16", "out_ptr": "*fp16"}
    integers = ("K", "stride_words", "stride_scales")
    constants = {"BN": 32, "GROUP": 0}

    def kernel() -> Any:
        from torchlathe.kernels.w8a16.triton import unpack_w8

        return unpack_w8

    return Case(
        op="w8a16",
        config="unpacking fp16 gK BN32 warps4",
        kernel=kernel,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constants=lambda _: constants,
        divisible=(*pointers, *integers),
        step=(32 * 128, 0),
        # The speed of memory allows 20 slots for a weight of one byte that becomes two.
        limits=Limits(slots={"sm_90": 14.0}),
        loops=False,
    )


def cases() -> Iterator[Case]:
    """Each tile of the shipped table, both types, with a scale per row and with groups."""
    yield _case(8, 64, limit=3.2)
    yield _case(8, 64, split=4, limit=3.2)
    yield _case(16, 128, limit=3.2)
    yield _case(16, 128, split=2, limit=3.2)
    yield _case(8, 64, dtype="bf16", limit=3.2)
    yield _case(16, 128, dtype="bf16", limit=3.2)
    yield _case(16, 128, group=128, limit=3.2)
    yield _case(16, 128, rank=64, limit=3.2)
    yield _case(32, 128, limit=3.5)
    yield _case(64, 128, warps=8, limit=4.8)
    yield _unpacking()
