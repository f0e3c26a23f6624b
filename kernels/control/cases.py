"""The kernel that must fail the check, with the limits of the one that must pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]


def _kernel() -> Any:
    from torchlathe.kernels.control.triton import gptq_w4a16

    return gptq_w4a16


def cases() -> Iterator[Case]:
    """One tile, comparable to W4A16's for 16 tokens."""
    pointers = ("x_ptr", "words_ptr", "scales_ptr", "out_ptr")
    yield Case(
        op="control",
        config="fp16 g128 BM16 BN64 BK128, GPTQ's layout",
        kernel=_kernel,
        signature=dict.fromkeys(pointers, "*fp16")
        | dict.fromkeys(("M", "N", "K", "stride_x"), "i32")
        | {"words_ptr": "*i32"},
        constants=lambda _: {"BM": 16, "BN": 64, "BK": 128},
        divisible=(*pointers, "N", "K", "stride_x"),
        # Each of its 32-bit words is copied eight times, once for each weight in it.
        step=(64 * 128, 64 * 128 * 4 + 16 * 128 * 2),
        limits=Limits(slots={"sm_90": 2.6}, mma={"sm_90": {"wgmma-registers"}}, conversions=0),
        architectures=("sm_90",),
    )
