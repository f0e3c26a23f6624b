"""The specialisations of W4A16 for experts that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]

_QUARTER = 64


def _product() -> Any:
    from torchlathe.kernels.w4a16.triton import w4a16_experts

    return w4a16_experts


def _case(BM: int, BN: int, *, dtype: str = "fp16", limit: float) -> Case:
    pointers = dict.fromkeys(("x_ptr", "scales_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"order_ptr": "*i32", "blocks_ptr": "*i32", "words_ptr": "*i16"}
    pointers |= {"zeros_ptr": "*u8", "weights_ptr": "*fp32"}
    strides = ("stride_x", "stride_words", "stride_scales", "words_each", "scales_each")

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "QUARTER": _QUARTER,
            "GROUP": 128,
            "HAS_ORDER": True,
            "HAS_ZEROS": False,
            "HAS_WEIGHTS": True,
            "ACTIVATION": 0,
            "WIDE": False,
            "FAST": architecture.is_nvidia,
        }

    return Case(
        op="w4a16_experts",
        config=f"{dtype} g128 BM{BM} BN{BN} warps4 stages4",
        kernel=_product,
        signature=pointers | dict.fromkeys(("N", "spans", *strides), "i32"),
        constants=constants,
        divisible=(*pointers, *strides),
        step=(BN * 4 * _QUARTER, 2 * BN * _QUARTER + 8 * _QUARTER * BM),
        limits=Limits(
            slots={"sm_90": limit},
            mma={
                "sm_80": {"mma"},
                "sm_90": {"mma"} if BM <= 8 else {"wgmma-registers"},
                "gfx942": {"mfma"},
            },
            conversions=0,
        ),
        num_stages=4,
    )


def cases() -> Iterator[Case]:
    """Each tile that is used, and bf16."""
    yield _case(8, 64, limit=2.6)
    yield _case(16, 128, limit=2.6)
    yield _case(32, 128, limit=2.8)
    yield _case(8, 64, dtype="bf16", limit=2.6)
