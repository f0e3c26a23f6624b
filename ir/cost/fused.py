"""FLOPs of the project's own ops: those of the layers that they stand for.

Bias, activation and residual are not counted, as elsewhere; nor is what padding adds, but for the
rank of low-rank terms, of which no more is known.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torchlathe.ir.cost.calls import Call
from torchlathe.ir.extents import Extent

__all__ = ["FUSED_FLOPS"]

_GATES = ("bilinear", "reglu", "swiglu", "geglu", "geglu_tanh")


def _rows(call: Call) -> Extent:
    """Rows of the weights for each feature of the result: a gate has a row of its own."""
    return 2 if call.argument("activation", "none") in _GATES else 1


def _linear(call: Call) -> Extent:
    return 2 * _rows(call) * call.outputs[0].numel * call.argument("x").shape[-1]


def _low_rank(call: Call) -> Extent:
    """The layer, and its term: ``narrow`` is a product of its own where it is an argument."""
    up = 2 * _rows(call) * call.outputs[0].numel * call.argument("up").shape[1]
    down = call.argument("down")
    narrow = 0 if down is None else 2 * call.argument("x").numel * down.shape[0]
    return up + narrow


def _linear_and_low_rank(call: Call) -> Extent:
    return _linear(call) + _low_rank(call)


def _block_sparse(call: Call) -> Extent:
    x = call.argument("x")
    return 2 * prod(x.shape[:-1]) * call.argument("values").numel


def _convolution(call: Call) -> Extent:
    window = prod(call.argument("kernel")) * call.argument("x").shape[1]
    return 2 * call.outputs[0].numel * window


FUSED_FLOPS: dict[str, Callable[[Call], Extent]] = {
    **{
        f"torchlathe::{name}_linear": _linear
        for name in (
            "semi_structured",
            "w4a16",
            "w4a16_cpu",
            "w4a16_experts",
            "w4a8",
            "w8a16",
            "w8a16_cpu",
            "w8a16_experts",
            "w8a8",
            "w8a8_experts",
        )
    },
    **{
        f"torchlathe::{name}_low_rank_linear": _linear_and_low_rank
        for name in ("w4a16", "w4a8", "w8a16", "w8a8")
    },
    "torchlathe::low_rank_linear": _low_rank,
    "torchlathe::block_sparse_linear": _block_sparse,
    "torchlathe::w8a8_conv2d": _convolution,
}
