"""The specialisations of the block-sparse kernel that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]


def _kernel() -> Any:
    from torchlathe.kernels.block_sparse.triton import block_sparse

    return block_sparse


def _case(
    BM: int,
    size: int,
    *,
    dtype: str = "fp16",
    split: int = 1,
    warps: int = 4,
    stages: int = 4,
    limit: float,
) -> Case:
    names = ("x_ptr", "values_ptr", "columns_ptr", "offsets_ptr", "bias_ptr", "residual_ptr")
    pointers = dict.fromkeys((*names, "out_ptr"), f"*{dtype}")
    pointers |= {"columns_ptr": "*i32", "offsets_ptr": "*i32"}
    if split > 1:
        pointers["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": size,
            "SPLIT_K": split,
            "HAS_BIAS": split == 1,
            "HAS_RESIDUAL": False,
            "ACTIVATION": 0,
            "WIDE": False,
        }

    name = f"{dtype} blocks of {size} BM{BM} warps{warps} stages{stages}"
    return Case(
        op="block_sparse",
        config=name + f" split{split}" * (split > 1),
        kernel=_kernel,
        signature=pointers | dict.fromkeys(("M", "N", "stride_x"), "i32"),
        constants=constants,
        divisible=(*pointers, "stride_x"),
        step=(size * size, 2 * size * (size + BM)),
        limits=Limits(
            slots={"sm_90": limit},
            mma={"sm_80": {"mma"}, "sm_90": {"mma", "wgmma-shared"}, "gfx942": {"mfma"}},
            conversions=0,
        ),
        # A block of 128 and its activations are 34 KB, and take the whole LDS in two stages.
        architectures=("sm_80", "sm_90", "gfx942") if size == 64 else ("sm_80", "sm_90"),
        num_warps=warps,
        num_stages=stages,
    )


def cases() -> Iterator[Case]:
    """Both sizes of blocks, for few tokens and for many."""
    # The speed of memory allows 13.8 slots for a weight of two bytes.
    yield _case(8, 64, limit=4.0)
    yield _case(16, 64, split=4, limit=4.0)
    yield _case(128, 64, warps=8, limit=9.6)
    yield _case(16, 128, dtype="bf16", limit=4.0)
    yield _case(64, 128, warps=8, stages=3, limit=4.0)
