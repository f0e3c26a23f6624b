"""Specialisations of the one product kernel, from which each op's cases are made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torchlathe.kernels.aot.compiling import Architecture
from torchlathe.kernels.aot.matrix import Case, Limits

__all__ = ["Format", "product_case"]

_POINTERS = (
    "x_ptr",
    "x_scales_ptr",
    "weight_ptr",
    "scales_ptr",
    "zeros_ptr",
    "bias_ptr",
    "residual_ptr",
    "narrow_ptr",
    "up_ptr",
    "order_ptr",
    "places_ptr",
    "blocks_ptr",
    "weights_ptr",
    "out_ptr",
)
# The ops pad K to whole spans and rows to 128; N itself need not be a multiple of anything.
_STRIDES = ("stride_x", "stride_weight", "stride_scales", "weight_each", "scales_each")


@dataclass(frozen=True)
class Format:
    """A format of weights, as the kernel knows it.

    Attributes:
        kind: Its place in `torchlathe.kernels.blocks.launching.KINDS`.
        weight: Triton's type of what the weights are packed in.
        x: That of the activations.
        scales: That of the scales.
        out: That of the result, of biases and low-rank factors.
        piece: Columns of a span that lie together.
        pieces: How many of them a span has.
        x_bytes: Of one activation.
        packed_bytes: Of one row of a piece of the packed weights.
    """

    kind: int
    weight: str
    x: str
    scales: str
    out: str
    piece: int
    pieces: int
    x_bytes: int
    packed_bytes: int


def product_case(
    op: str,
    config: str,
    form: Format,
    BM: int,
    BN: int,
    *,
    limit: float,
    old: float | None = None,
    group: int = 0,
    zeros: bool = False,
    split: int = 1,
    rank: int = 0,
    experts: bool = False,
    activation: int = 0,
    warps: int = 4,
    stages: int = 4,
    hopper: Collection[str] | None = None,
    others: Mapping[str, Collection[str]] | None = None,
    conversions: int | None = None,
    architectures: Collection[str] = ("sm_80", "sm_90", "gfx942"),
) -> Case:
    """One specialisation.

    Args:
        op: Name of the op.
        config: What tells the case from others of the op, without tile, split and rank.
        form: The format of the weights.
        BM: Tokens of a block (at least 16 on AMD).
        BN: Rows of a block.
        limit: Most instruction slots per weight on sm_90.
        old: The same on sm_80; none without.
        group: Weights that share a scale.
        zeros: Whether there are zero points.
        split: Blocks that share a sum.
        rank: Of a low-rank term.
        experts: Whether slots are routed to experts.
        activation: The kernels' code of an activation.
        warps: Warps of a block.
        stages: Stages of the pipeline.
        hopper: Matrix instructions that will do on sm_90; by default those from registers.
        others: The same by other architecture.
        conversions: Most conversions of integers in the loop.
        architectures: What it is compiled for.
    """
    types = dict.fromkeys(_POINTERS, f"*{form.out}")
    types |= {"x_ptr": f"*{form.x}", "weight_ptr": f"*{form.weight}", "zeros_ptr": "*u8"}
    types |= {"scales_ptr": f"*{form.scales}", "x_scales_ptr": "*fp32", "weights_ptr": "*fp32"}
    types |= dict.fromkeys(("order_ptr", "places_ptr", "blocks_ptr"), "*i32")
    if split > 1:
        types["out_ptr"] = "*fp32"

    def constants(architecture: Architecture) -> Mapping[str, Any]:
        return {
            "KIND": form.kind,
            "BM": BM if architecture.is_nvidia else max(BM, 16),
            "BN": BN,
            "PIECE": form.piece,
            "PIECES": form.pieces,
            "GROUP": group,
            "SPLIT_K": split,
            "RANK": rank,
            "EXPERTS": experts,
            "HAS_ORDER": experts,
            "HAS_PLACES": experts,
            "HAS_ZEROS": zeros,
            "HAS_BIAS": split == 1 and not experts,
            "HAS_RESIDUAL": False,
            "HAS_WEIGHTS": experts,
            "ACTIVATION": activation,
            "WIDE": False,
            "FAST": architecture.is_nvidia,
        }

    wanted = hopper or ({"mma"} if BM <= 8 else {"wgmma-registers"})
    span = form.piece * form.pieces
    slots = {"sm_90": limit} | ({"sm_80": old} if old else {})
    return Case(
        op=op,
        config=config,
        kernel=_product,
        signature=types | dict.fromkeys(("M", "N", "steps", *_STRIDES), "i32"),
        constants=constants,
        divisible=(*_POINTERS, *_STRIDES),
        step=(BN * span, BN * form.packed_bytes + span * form.x_bytes * BM),
        limits=Limits(
            slots=slots,
            mma={"sm_80": {"mma"}, "sm_90": wanted} | dict(others or {}),
            conversions=conversions,
        ),
        architectures=architectures,
        num_warps=warps,
        num_stages=stages,
    )


def _product() -> Any:
    from torchlathe.kernels.product.triton import product

    return product
