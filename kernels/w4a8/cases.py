"""The specialisations of the W4A8 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]


def _product() -> Any:
    from torchlathe.kernels.w4a8.triton import w4a8

    return w4a8


def _case(
    BM: int,
    BN: int,
    *,
    group: int = 0,
    half: int = 128,
    split: int = 1,
    warps: int = 4,
    limit: float,
) -> Case:
    pointers = {"x_ptr": "*i8", "packed_ptr": "*i8", "out_ptr": "*bf16"}
    pointers |= {"x_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
    pointers |= {"bias_ptr": "*bf16", "residual_ptr": "*bf16"}
    if split > 1:
        pointers["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "HALF": half,
            "GROUP": group,
            "SPLIT_K": split,
            "HAS_BIAS": split == 1,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "FAST": architecture.is_nvidia,
        }

    name = f"g{group or 'K'} half{half} BM{BM} BN{BN} warps{warps} stages4"
    strides = ("stride_x", "stride_packed", "stride_scales")
    return Case(
        op="w4a8",
        config=name + f" split{split}" * (split > 1),
        kernel=_product,
        signature=pointers | dict.fromkeys(("M", "N", "steps", *strides), "i32"),
        constants=constants,
        divisible=(*pointers, *strides),
        step=(BN * 2 * half, BN * half + BM * 2 * half),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"mma"} if BM <= 8 else {"wgmma-registers"}},
        ),
        num_warps=warps,
        num_stages=4,
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
