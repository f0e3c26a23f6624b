"""The specialisations of the W8A16 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]


def _product() -> Any:
    from torchlathe.kernels.w8a16.triton import w8a16

    return w8a16


def _case(
    BM: int,
    BN: int,
    *,
    dtype: str = "fp16",
    group: int = 0,
    split: int = 1,
    warps: int = 4,
    limit: float,
) -> Case:
    names = ("x_ptr", "words_ptr", "scales_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    pointers = dict.fromkeys(names, f"*{dtype}") | {"words_ptr": "*i16"}
    if split > 1:
        pointers["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "GROUP": group,
            "SPLIT_K": split,
            "HAS_BIAS": split == 1,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "WIDE": False,
            "FAST": architecture.is_nvidia,
        }

    strides = ("stride_x", "stride_words", "stride_scales")
    name = f"{dtype} g{group or 'K'} BM{BM} BN{BN} warps{warps} stages4"
    return Case(
        op="w8a16",
        config=name + f" split{split}" * (split > 1),
        kernel=_product,
        signature=pointers | dict.fromkeys(("M", "N", "steps", *strides), "i32"),
        constants=constants,
        divisible=(*pointers, *strides),
        step=(BN * 128, BN * 128 + BM * 256),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"mma"} if BM <= 8 else {"wgmma-registers"}},
            conversions=0,
        ),
        num_warps=warps,
        num_stages=4,
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
    yield _case(32, 128, limit=3.5)
    yield _case(64, 128, warps=8, limit=4.8)
    yield _unpacking()
