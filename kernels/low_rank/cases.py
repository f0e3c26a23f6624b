"""The specialisations of the low-rank kernels that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]

# The speed of memory allows 13.8 slots for a weight of two bytes.
_LIMIT = 4.0


def _narrowed() -> Any:
    from torchlathe.kernels.low_rank.triton import narrowed

    return narrowed


def _widened() -> Any:
    from torchlathe.kernels.low_rank.triton import widened_again

    return widened_again


def _narrowing(BM: int, split: int, limit: float = _LIMIT) -> Case:
    pointers = {"x_ptr": "*bf16", "down_ptr": "*bf16", "parts_ptr": "*fp32"}

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        BM_there = BM if architecture.is_nvidia else max(BM, 16)
        return {"BM": BM_there, "BN": 64, "BK": 128, "SPLIT_K": split, "WIDE": False}

    strides = ("stride_x", "stride_down")
    return Case(
        op="low_rank",
        config=f"down bf16 BM{BM} BN64 warps4 stages4 split{split}",
        kernel=_narrowed,
        signature=pointers | dict.fromkeys(("M", "R", "steps", *strides), "i32"),
        constants=constants,
        divisible=(*pointers, "R", *strides),
        step=(64 * 128, 2 * 128 * (64 + BM)),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"mma", "wgmma-shared"}, "gfx942": {"mfma"}},
            conversions=0,
        ),
        num_stages=4,
    )


def _widening(BM: int, BN: int, parts: int, limit: float) -> Case:
    names = ("up_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    pointers = {"parts_ptr": "*fp32"} | dict.fromkeys(names, "*bf16")

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "BK": 64,
            "PARTS": parts,
            "HAS_BIAS": True,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "WIDE": False,
        }

    return Case(
        op="low_rank",
        config=f"up bf16 BM{BM} BN{BN} warps4 stages2 parts{parts}",
        kernel=_widened,
        signature=pointers | dict.fromkeys(("M", "N", "R"), "i32"),
        constants=constants,
        divisible=(*pointers, "R"),
        # Where the parts are copied asynchronously too.
        step=(BN * 64, 2 * BN * 64 + 4 * 64 * BM * parts),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"mma", "wgmma-shared"}, "gfx942": {"mfma"}},
            conversions=0,
        ),
        num_stages=2,
    )


def cases() -> Iterator[Case]:
    """Both kernels for few tokens, and with as many parts as are used."""
    yield _narrowing(8, 8)
    yield _narrowing(16, 8)
    # Adding up eight parts is most of what blocks of 64 do.
    yield _widening(8, 64, 8, 9.7)
    yield _widening(16, 128, 8, 5.0)
