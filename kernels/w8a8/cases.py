"""The specialisations of the W8A8 kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]

_BK = 128


def _product() -> Any:
    from torchlathe.kernels.w8a8.triton import w8a8

    return w8a8


def _case(
    BM: int, BN: int, *, kind: str = "i8", split: int = 1, warps: int = 4, limit: float
) -> Case:
    pointers = {"x_ptr": f"*{kind}", "weight_ptr": f"*{kind}", "out_ptr": "*bf16"}
    pointers |= {"x_scales_ptr": "*fp32", "scales_ptr": "*fp32"}
    pointers |= {"bias_ptr": "*bf16", "residual_ptr": "*bf16"}
    if split > 1:
        pointers["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "BK": _BK,
            "SPLIT_K": split,
            "HAS_BIAS": split == 1,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "INTEGER": kind == "i8",
        }

    integers = dict.fromkeys(("M", "N", "steps", "stride_x", "stride_weight"), "i32")
    name = "int8" if kind == "i8" else "fp8"
    return Case(
        op="w8a8",
        config=f"{name} BM{BM} BN{BN} warps{warps} stages4" + f" split{split}" * (split > 1),
        kernel=_product,
        signature=pointers | integers,
        constants=constants,
        divisible=(*pointers, "stride_x", "stride_weight"),
        step=(BN * _BK, BN * _BK + BM * _BK),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"wgmma-shared", "wgmma-registers", "mma"}},
        ),
        # fp8 does not exist on sm_80, and is another format on gfx942.
        architectures=("sm_80", "sm_90", "gfx942") if kind == "i8" else ("sm_90",),
        num_warps=warps,
        num_stages=4,
    )


def cases() -> Iterator[Case]:
    """Each tile of the shipped table, as integers and as floats."""
    # The speed of memory allows 6.9 slots; these need few, so that latency is what is left.
    for kind in ("i8", "fp8e4nv"):
        if kind == "i8":  # fp8 tiles of 8 tokens go through fp16
            yield _case(8, 64, kind=kind, limit=1.5)
        yield _case(16, 128, kind=kind, limit=1.5)
        yield _case(16, 64, kind=kind, split=4, limit=2.0)
        yield _case(64, 128, kind=kind, warps=8, limit=2.0)
