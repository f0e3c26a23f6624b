"""Arithmetic of everything that is no contraction, and the ops that only move data.

A simple rule on purpose: one operation per element of the result, a transcendental function
counting as one, unless the tables below say otherwise. These operations are bound by memory, so
the bytes matter, and these counts serve to compare.
"""

from __future__ import annotations

from math import prod

import torch

from torchlathe.ir.cost.calls import Call, aten, is_contiguous
from torchlathe.ir.extents import Extent

__all__ = ["has_softmax", "is_free", "other_flops", "reads_rows"]

# Ops that copy, select or create and compute nothing.
_MOVES = aten(
    """
    alpha_dropout arange cat channel_shuffle clone complex concat constant_pad_nd
    contiguous copy diag_embed dropout embedding empty empty_like eye feature_dropout flatten flip
    float full full_like gather half hstack im2col index index_copy index_put
    index_select lift_fresh_copy linspace masked_fill masked_scatter masked_select meshgrid
    new_empty new_full new_ones new_zeros nonzero one_hot ones ones_like pad
    pixel_shuffle pixel_unshuffle rand rand_like randn randn_like reflection_pad1d reflection_pad2d
    reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d
    reshape reshape_as roll scalar_tensor scatter select_scatter slice_scatter stack
    take_along_dim tile to _to_copy tril triu type_as upsample_nearest1d upsample_nearest2d
    upsample_nearest3d vstack where zeros zeros_like
    """
)

# Ops whose result is a view of the first argument where its layout allows it.
_MAY_VIEW = aten("contiguous flatten reshape reshape_as view_as")

# Ops that return their first argument when they have nothing to convert, or in eval mode.
_MAY_PASS = aten(
    "to type_as float half dropout feature_dropout alpha_dropout feature_alpha_dropout"
)

# Operations per element of the result.
_PER_OUTPUT = {
    "aten::batch_norm": 2,  # at inference: a scale and a shift
    "aten::_native_batch_norm_legit_no_training": 2,
    "aten::group_norm": 8,  # mean 1, centre 1, variance 2, root and division 2, affine 2
    "aten::instance_norm": 8,
    "aten::layer_norm": 8,
    "aten::native_group_norm": 8,
    "aten::native_layer_norm": 8,
    "aten::rms_norm": 4,  # square, sum, scale, weight
    "aten::_fused_rms_norm": 4,
    "aten::_log_softmax": 5,
    "aten::_softmax": 5,  # maximum, difference, exponential, sum, division
    "aten::log_softmax": 5,
    "aten::softmax": 5,
    "aten::addcdiv": 3,
    "aten::addcmul": 3,
    "aten::grid_sampler": 8,
    "aten::lerp": 3,
    "aten::upsample_bicubic2d": 32,
    "aten::upsample_bilinear2d": 8,
    "aten::upsample_linear1d": 4,
    "aten::upsample_trilinear3d": 16,
}

# Operations per element of the first argument.
_PER_INPUT = {
    **dict.fromkeys(
        aten(
            """
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
            adaptive_max_pool2d adaptive_max_pool3d all amax amin aminmax any argmax argmin
            count_nonzero cummax cummin cumprod cumsum max mean min nanmean nansum prod sort sum
            topk trace _adaptive_avg_pool2d
            """
        ),
        1,
    ),
    "aten::linalg_vector_norm": 2,
    "aten::logsumexp": 3,
    "aten::norm": 2,
    "aten::std": 4,
    "aten::std_mean": 4,
    "aten::var": 4,
    "aten::var_mean": 4,
}

_POOLS = frozenset(
    f"aten::{kind}_pool{n}d{suffix}"
    for kind in ("avg", "max")
    for n in (1, 2, 3)
    for suffix in ("", "_with_indices")
)


def is_free(call: Call) -> bool:
    """Whether the call moves no data: a view, an op without tensor results, or nothing to do."""
    if not call.outputs:
        return True
    target = call.target
    if not isinstance(target, torch._ops.OpOverload):
        return True  # taking one of several results
    inputs = call.inputs
    # Their schemas speak of an alias as well, but that is only one of two things they do.
    if call.name in _MAY_VIEW:
        return bool(inputs) and is_contiguous(inputs[0])
    if call.name in _MAY_PASS:
        return bool(inputs) and inputs[0] == call.outputs[0] and not call.argument("train")
    returns = target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


_TABLE_OPS = aten("embedding gather index index_select")


def reads_rows(call: Call) -> bool:
    """Whether the first tensor is a table of which only the selected entries are read."""
    return call.name in _TABLE_OPS


def other_flops(call: Call) -> Extent:
    """Operations outside of contractions."""
    name = call.name
    if not call.outputs or name in _MOVES:
        return 0
    if has_softmax(call):
        return _softmax_of_scores(call)
    if name in _PER_INPUT and call.inputs:
        return _PER_INPUT[name] * call.inputs[0].numel
    if name in _POOLS:
        return _pooling(call)
    return _PER_OUTPUT.get(name, 1) * call.outputs[0].numel


def _pooling(call: Call) -> Extent:
    kernel = call.argument("kernel_size")
    spatial = next(int(c) for c in call.name if c.isdigit())
    window = prod(kernel) if len(kernel) == spatial else kernel[0] ** spatial
    return call.outputs[0].numel * window


def has_softmax(call: Call) -> bool:
    """Whether the call is a fused attention, which does arithmetic between its products."""
    return call.name.startswith(("aten::scaled_dot_product", "aten::_scaled_dot_product"))


def _softmax_of_scores(call: Call) -> Extent:
    """The softmax, and the mask's addition."""
    scores = prod(call.outputs[0].shape[:-1]) * call.args[1].shape[-2]
    masked = call.argument("attn_mask", call.argument("attn_bias")) is not None
    return (5 + masked) * scores
