"""The specialisations of the W4A16 kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]

_POINTERS = (
    "x_ptr",
    "words_ptr",
    "scales_ptr",
    "zeros_ptr",
    "bias_ptr",
    "residual_ptr",
    "narrow_ptr",
    "up_ptr",
    "out_ptr",
)
_INTEGERS = ("M", "N", "spans", "stride_x", "stride_words", "stride_scales")
# The op pads K to whole spans and rows to 128; N itself need not be a multiple of anything.
_DIVISIBLE = (*_POINTERS, "stride_x", "stride_words", "stride_scales")


def _product() -> Any:
    from torchlathe.kernels.w4a16.triton import w4a16

    return w4a16


def _case(
    BM: int,
    BN: int,
    *,
    group: int = 128,
    dtype: str = "fp16",
    zeros: bool = False,
    split: int = 1,
    rank: int = 0,
    warps: int = 4,
    stages: int = 4,
    limit: float,
    old: float | None = None,
) -> Case:
    quarter = 32 if group == 32 else 64
    signature = {name: f"*{dtype}" for name in _POINTERS} | dict.fromkeys(_INTEGERS, "i32")
    signature |= {"words_ptr": "*i16", "zeros_ptr": "*u8"}
    if split > 1:
        signature["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "QUARTER": quarter,
            "GROUP": group,
            "SPLIT_K": split,
            "RANK": rank,
            "HAS_ZEROS": zeros,
            "HAS_BIAS": split == 1,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "WIDE": False,
            "FAST": architecture.is_nvidia,
        }

    name = f"{dtype} g{group or 'K'} BM{BM} BN{BN} warps{warps} stages{stages}"
    name += f" split{split}" * (split > 1) + " zeros" * zeros + f" rank{rank}" * (rank > 0)
    wgmma = {"mma"} if BM <= 8 else {"wgmma-registers"}
    return Case(
        op="w4a16",
        config=name,
        kernel=_product,
        signature=signature,
        constants=constants,
        divisible=_DIVISIBLE,
        step=(BN * 4 * quarter, 2 * BN * quarter + 8 * quarter * max(BM, 1)),
        limits=Limits(
            slots={"sm_80": old or limit, "sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": wgmma, "gfx942": {"mfma"}},
            conversions=0,
        ),
        num_warps=warps,
        num_stages=stages,
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
    yield _unpacking()
