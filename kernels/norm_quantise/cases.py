"""The specialisations of the norm that quantises that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["cases"]


def _kernel() -> Any:
    from torchlathe.kernels.norm_quantise.triton import norm_quantise

    return norm_quantise


def _case(
    width: int,
    *,
    kind: str = "i8",
    norm: bool = True,
    mean: bool = False,
    residual: bool = True,
    each: int = 1,
    limit: float,
) -> Case:
    names = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "summed_ptr")
    pointers = dict.fromkeys(names, "*bf16") | {"out_ptr": f"*{kind}", "scales_ptr": "*fp32"}
    block = 1 << (width - 1).bit_length()
    warps = warps_for(block)
    constants = {
        "BLOCK": block,
        "EACH": each,
        "WHOLE": block == width,
        "NORM": norm,
        "MEAN": mean,
        "HAS_RESIDUAL": residual,
        "HAS_BIAS": mean,
        "INTEGER": kind == "i8",
    }
    kind_of_norm = "layer" if mean else "rms" if norm else "as they are"
    name = f"{kind_of_norm} {'int8' if kind == 'i8' else 'fp8'} width{width}"
    return Case(
        op="norm_quantise",
        config=name + " residual" * residual + f" warps{warps}" + f" rows{each}" * (each > 1),
        kernel=_kernel,
        signature=pointers | {"rows": "i32", "width": "i32", "eps": "fp32"},
        constants=lambda _: constants,
        divisible=(*pointers, "width"),
        step=(width * each, 0),
        limits=Limits(slots={"sm_90": limit}),
        architectures=("sm_80", "sm_90", "gfx942") if kind == "i8" else ("sm_90",),
        num_warps=warps,
        num_stages=1,
        loops=False,
    )


def warps_for(width: int) -> int:
    """Warps of a row: 32 elements for each thread, in four loads of 16 bytes."""
    return min(16, max(1, width // 1024))


def cases() -> Iterator[Case]:
    """Widths of usual models, both norms, both types."""
    # The speed of memory (4.3 TB/s) allows an H200 48 instructions for each element where a
    # residual makes it 7 bytes, and 20 where it is 3.
    yield _case(1024, limit=18.0)
    yield _case(4096, limit=18.0)
    yield _case(4096, residual=False, limit=14.0)
    yield _case(4096, residual=False, each=4, limit=14.0)
    yield _case(4096, mean=True, limit=24.0)
    yield _case(8192, limit=18.0)
    yield _case(4096, kind="fp8e4nv", limit=20.0)
    # Without a norm.
    yield _case(4096, norm=False, residual=False, limit=14.0)
    yield _case(14336, norm=False, residual=False, limit=24.0)
    yield _case(4096, norm=False, residual=False, kind="fp8e4nv", limit=20.0)
