"""FLOPs of contractions: matrix products, convolutions, attention, recurrent layers.

Keeps: the conventions of ``torch.utils.flop_counter``: 2 for a multiplication and its addition,
bias left out, causal masks ignored. What it has no formula for, it counts as nothing (matrix times
vector, integer and grouped products, the fused attention of CPUs); these are counted here alike.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torchlathe.ir.cost.calls import Call, Value
from torchlathe.ir.cost.fused import FUSED_FLOPS
from torchlathe.ir.extents import Extent

__all__ = ["FLOPS"]


def _product_of(first: str) -> Callable[[Call], Extent]:
    """A product that contracts the last axis of the argument ``first``."""

    def flops(call: Call) -> Extent:
        return 2 * call.outputs[0].numel * call.argument(first).shape[-1]

    return flops


def _addbmm(call: Call) -> Extent:
    return 2 * call.argument("batch1").numel * call.outputs[0].shape[-1]


def _grouped_mm(call: Call) -> Extent:
    """Rows of one matrix, or slices of the contracted axis, are shared out among the groups."""
    a, b = call.args[:2]
    if len(a.shape) == 2 and len(b.shape) == 2:
        return 2 * a.numel * b.shape[-1]
    return 2 * call.outputs[0].numel * a.shape[-1]


def _tensordot(call: Call) -> Extent:
    a, b = call.args[:2]
    contracted = {axis % len(b.shape) for axis in call.argument("dims_other")}
    return 2 * a.numel * prod(n for axis, n in enumerate(b.shape) if axis not in contracted)


def _bilinear(call: Call) -> Extent:
    return 2 * call.outputs[0].numel * call.args[0].shape[-1] * call.args[1].shape[-1]


def _convolution(call: Call) -> Extent:
    weight = call.args[1]
    transposed = "transpose" in call.name or bool(call.argument("transposed", False))
    moving = call.args[0] if transposed else call.outputs[0]
    spatial = len(weight.shape) - 2
    batch = moving.shape[0] if len(moving.shape) == spatial + 2 else 1
    # The weight has one of its channel axes divided by the groups already.
    return 2 * batch * prod(moving.shape[len(moving.shape) - spatial :]) * weight.numel


def _attention(call: Call) -> Extent:
    query, key, value = call.args[:3]
    rows = prod(call.outputs[0].shape[:-1])
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _recurrent(call: Call) -> Extent:
    """Every matrix of every layer and direction meets each step of each sequence once."""
    # (input, hx, params, ...) for whole sequences, (data, batch_sizes, hx, params, ...) packed.
    params = call.argument("params")
    x = call.args[0]
    weights = sum(p.numel for p in params if len(p.shape) == 2)
    return 2 * prod(x.shape[:-1]) * weights


def _recurrent_cell(call: Call) -> Extent:
    weights = call.argument("w_ih").numel + call.argument("w_hh").numel
    return 2 * prod(call.args[0].shape[:-1]) * weights


def _einsum(call: Call) -> Extent:
    """Contract pair by pair as ATen does, along the path that came with the call."""
    equation, operands = call.args[0], call.args[1]
    path = call.argument("path")
    terms, output = _axes_of(equation, operands)
    counts: dict[str, int] = {}
    for term in terms:
        for label in term:
            counts[label] = counts.get(label, 0) + (label not in output)
    total: Extent = 0
    steps = iter(path or ())
    while len(terms) > 1:
        i, j = (next(steps), next(steps)) if path else (0, 1)
        i, j = sorted((i % len(terms), j % len(terms)))
        b, a = terms.pop(j), terms.pop(i)
        pair, flops = _contract_pair(a, b, output, counts)
        total = total + flops
        terms.insert(len(terms) if path else 0, pair)
    return total


def _contract_pair(
    a: dict[str, Extent], b: dict[str, Extent], output: set[str], counts: dict[str, int]
) -> tuple[dict[str, Extent], Extent]:
    """Contract what no later operand has; without such an axis the pair is multiplied only."""
    summed = set()
    for label in (a.keys() | b.keys()) - output:
        shared = label in a and label in b
        counts[label] -= shared
        if counts[label] == 1:
            counts[label] = 0
            summed.add(label)
            if not shared:
                # Summed before the product.
                a.pop(label, None)
                b.pop(label, None)
    sizes = {**a, **b}
    contracts = any(label in a and label in b for label in summed)
    flops = 2 * prod(sizes.values()) if contracts else 0
    return {k: n for k, n in sizes.items() if k not in summed}, flops


def _axes_of(
    equation: str, operands: tuple[Value, ...]
) -> tuple[list[dict[str, Extent]], set[str]]:
    """Per operand its labelled extents, axes of extent 1 left out, and the labels of the result."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    widest = 0
    for subscripts, operand in zip(left.split(","), operands, strict=True):
        hidden = len(operand.shape) - len(subscripts.replace("...", ""))
        widest = max(widest, hidden)
        # Ellipsis axes are named from the right, as they broadcast.
        broadcast = "".join(chr(0x2460 + n) for n in range(hidden))[::-1]
        labels = subscripts.replace("...", broadcast)
        axes = zip(labels, operand.shape, strict=True)
        terms.append({label: extent for label, extent in axes if extent != 1})
    every = left.replace(",", "").replace("...", "")
    dots = {chr(0x2460 + n) for n in range(widest)}
    if not arrow:
        return terms, {c for c in every if every.count(c) == 1} | dots
    output = set(right.replace("...", ""))
    return terms, output | dots if "..." in right else output


_FIRST = _product_of("self")
_ATTENTION_OPS = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_CONVOLUTION_OPS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "_convolution",
)

FLOPS: dict[str, Callable[[Call], Extent]] = {
    "aten::linear": _product_of("input"),
    "aten::mm": _FIRST,
    "aten::bmm": _FIRST,
    "aten::matmul": _FIRST,
    "aten::mv": _FIRST,
    "aten::dot": _FIRST,
    "aten::vdot": _FIRST,
    "aten::inner": _FIRST,
    "aten::addmm": _product_of("mat1"),
    "aten::addmv": _product_of("mat"),
    "aten::baddbmm": _product_of("batch1"),
    "aten::addbmm": _addbmm,
    "aten::_scaled_mm": _FIRST,
    "aten::_int_mm": _FIRST,
    "aten::_grouped_mm": _grouped_mm,
    "aten::_scaled_grouped_mm": _grouped_mm,
    "aten::_weight_int8pack_mm": _FIRST,
    "aten::_weight_int4pack_mm": _FIRST,
    "aten::_weight_int4pack_mm_for_cpu": _FIRST,
    **FUSED_FLOPS,
    "aten::tensordot": _tensordot,
    "aten::einsum": _einsum,
    "aten::bilinear": _bilinear,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
    "aten::rnn_tanh": _recurrent,
    "aten::rnn_relu": _recurrent,
    "aten::lstm_cell": _recurrent_cell,
    "aten::gru_cell": _recurrent_cell,
    "aten::rnn_tanh_cell": _recurrent_cell,
    "aten::rnn_relu_cell": _recurrent_cell,
    **{f"aten::{name}": _attention for name in _ATTENTION_OPS},
    **{f"aten::{name}": _convolution for name in _CONVOLUTION_OPS},
}
