"""The specialisations of the W4A16 kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlathe.kernels.aot.matrix import Case, Limits
from torchlathe.kernels.blocks.cases import Format, product_case

__all__ = ["cases", "w4a16_format"]


def w4a16_format(dtype: str = "fp16", group: int = 128) -> Format:
    """W4A16 as the kernel knows it."""
    quarter = 32 if group == 32 else 64
    return Format(0, "i16", dtype, dtype, dtype, quarter, 4, 2, 2 * quarter)


def _case(
    BM: int,
    BN: int,
    *,
    group: int = 128,
    dtype: str = "fp16",
    zeros: bool = False,
    split: int = 1,
    rank: int = 0,
    activation: int = 0,
    warps: int = 4,
    stages: int = 4,
    limit: float,
    old: float | None = None,
) -> Case:
    name = f"{dtype} g{group or 'K'} BM{BM} BN{BN} warps{warps} stages{stages}"
    name += f" split{split}" * (split > 1) + " zeros" * zeros + f" rank{rank}" * (rank > 0)
    return product_case(
        "w4a16",
        name + " gated" * (activation >= 16),
        w4a16_format(dtype, group),
        BM,
        BN,
        limit=limit,
        old=old or limit,
        group=group,
        zeros=zeros,
        split=split,
        rank=rank,
        activation=activation,
        warps=warps,
        stages=stages,
        others={"gfx942": {"mfma"}},
        conversions=0,
    )


def _unpacking() -> Case:
    pointers = {"words_ptr": "*i16", "scales_ptr": "*fp16", "zeros_ptr": "*u8", "out_ptr": "*fp16"}
    integers = ("K", "stride_words", "stride_scales")
    constants = {"BN": 32, "QUARTER": 64, "GROUP": 128, "HAS_ZEROS": False}

    def kernel() -> Any:
        from torchlathe.kernels.w4a16.triton import unpack_w4

        return unpack_w4

    return Case(
        op="w4a16",
        config="unpacking fp16 g128 BN32 warps4",
        kernel=kernel,
        signature=pointers | dict.fromkeys(integers, "i32"),
        constants=lambda _: constants,
        divisible=(*pointers, *integers),
        step=(32 * 256, 0),
        # The speed of memory allows 17 slots for a weight of half a byte that becomes two bytes.
        limits=Limits(slots={"sm_90": 11.0}),
        loops=False,
    )


def cases() -> Iterator[Case]:
    """Each tile of the shipped table, each group, each dtype, and zero points."""
    # 2.6 is the bar for up to 16 tokens. The speed of memory allows 3.56 with groups of 128,
    # which what is above 16 tokens keeps; groups of 32 scale four times as often.
    yield _case(2, 64, limit=2.6)
    yield _case(8, 64, limit=2.6)
    yield _case(8, 64, split=4, limit=2.6)
    yield _case(8, 128, limit=2.6)
    yield _case(16, 128, limit=2.6)
    yield _case(16, 128, split=2, limit=2.6)
    yield _case(16, 128, dtype="bf16", limit=2.6)
    yield _case(8, 64, dtype="bf16", limit=2.6)
    yield _case(16, 128, zeros=True, limit=2.6, old=2.8)
    yield _case(8, 64, group=64, limit=2.6)
    yield _case(16, 128, group=64, limit=2.6)
    yield _case(8, 64, group=32, limit=3.4)
    yield _case(16, 128, group=32, limit=3.4)
    yield _case(8, 64, group=0, limit=2.0)
    yield _case(16, 128, group=0, limit=2.0)
    yield _case(32, 128, limit=2.8)
    yield _case(64, 128, warps=8, limit=3.56, old=4.8)
    yield _case(8, 64, rank=64, limit=2.6)
    yield _case(16, 128, rank=64, limit=2.6)
    yield _case(8, 64, activation=18, limit=2.6)
    yield _case(16, 128, activation=18, limit=2.6)
    yield _unpacking()
