"""Which rule each op has: a literal table, and the rules that users add."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from torchlathe.ir.axes.rule import Rule

__all__ = ["register_rule", "rule_of", "ruled_ops"]

# Rules that users registered, by schema name.
_registered: dict[str, Rule] = {}


def _names(text: str) -> list[str]:
    return [name if "::" in name else "aten::" + name for name in text.split()]


@functools.cache
def _table() -> Mapping[str, Rule]:
    """Built on first use, so that importing the package imports no rule."""
    from torchlathe.ir.axes.rules.attention import Attention
    from torchlathe.ir.axes.rules.contraction import Convolution, Einsum, MatMul, Signature
    from torchlathe.ir.axes.rules.creation import Filled, FilledLike, Numbered
    from torchlathe.ir.axes.rules.embedding import Embedding
    from torchlathe.ir.axes.rules.further import further_rows
    from torchlathe.ir.axes.rules.group_norm import GroupNorm
    from torchlathe.ir.axes.rules.normalization import (
        BatchNorm,
        InstanceNorm,
        LayerNorm,
        RMSNorm,
    )
    from torchlathe.ir.axes.rules.pinned import Extremum, PinnedAxis
    from torchlathe.ir.axes.rules.pointwise import Pointwise, PReLU
    from torchlathe.ir.axes.rules.reduction import AlongAxis, Reduce
    from torchlathe.ir.axes.rules.shaping import (
        Expand,
        Permute,
        Repeat,
        RepeatInterleave,
        Reshape,
        Squeeze,
        Unsqueeze,
    )
    from torchlathe.ir.axes.rules.slicing import (
        Cat,
        GatedHalves,
        Narrow,
        Select,
        Slice,
        Split,
        Stack,
    )
    from torchlathe.ir.axes.rules.spatial import OverPositions, PixelShuffle

    rows: list[tuple[Rule, str]] = [
        # -- pointwise
        (
            Pointwise("identity"),
            "to _to_copy clone contiguous dropout feature_dropout detach alias lift_fresh_copy "
            "type_as float half double bfloat16 alpha_dropout",
        ),
        (Pointwise("product"), "mul multiply __and__ bitwise_and logical_and"),
        (Pointwise("quotient"), "div divide true_divide floor_divide remainder fmod"),
        (Pointwise("branches"), "where"),
        (
            Pointwise("function"),
            "add sub subtract rsub neg abs sign sqrt rsqrt exp exp2 expm1 log log2 log10 log1p "
            "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh atan2 pow square "
            "reciprocal erf erfc relu relu6 gelu silu mish sigmoid log_sigmoid hardtanh "
            "hardswish hardsigmoid leaky_relu elu selu celu softplus softsign hardshrink "
            "softshrink threshold tanhshrink clamp clamp_min clamp_max clip maximum minimum fmax "
            "fmin floor ceil round trunc frac eq ne lt le gt ge logical_not logical_or "
            "logical_xor bitwise_not bitwise_or bitwise_xor __or__ __xor__ isnan isinf isfinite "
            "masked_fill lerp addcmul addcdiv nan_to_num rad2deg deg2rad logit sgn "
            "max.other min.other",
        ),
        (PReLU(), "prelu"),
        # -- contractions
        (Signature("input[*b, i] * weight[o, i] + bias[o] -> [*b, o]", "bias"), "linear"),
        (Signature("self[n, k] * mat2[k, m] -> [n, m]"), "mm"),
        (Signature("self[b, n, k] * mat2[b, k, m] -> [b, n, m]"), "bmm"),
        (Signature("mat1[n, k] * mat2[k, m] + self[n, m] -> [n, m]", "self"), "addmm"),
        (Signature("batch1[b, n, k] * batch2[b, k, m] + self[b, n, m] -> [b, n, m]"), "baddbmm"),
        (MatMul(), "matmul"),
        (Signature("self[n, k] * vec[k] -> [n]"), "mv"),
        (Signature("self[k] * tensor[k] -> []"), "dot"),
        (Signature("self[i] * vec2[o] -> [i, o]"), "outer"),
        (Einsum(), "einsum"),
        (Convolution(), "conv1d conv2d conv3d convolution"),
        (Convolution(transposed=True), "conv_transpose1d conv_transpose2d conv_transpose3d"),
        (Attention(), "scaled_dot_product_attention"),
        (Embedding(), "embedding"),
        # -- norms
        (LayerNorm(), "layer_norm"),
        (RMSNorm(), "rms_norm"),
        (
            BatchNorm(),
            "batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update "
            "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional",
        ),
        (InstanceNorm(), "instance_norm"),
        (GroupNorm(), "group_norm"),
        # -- reductions
        (Reduce("sum"), "sum norm linalg_vector_norm any"),
        (Reduce("mean"), "mean"),
        (Reduce("var_mean"), "var_mean"),
        (Reduce("std_mean"), "std_mean"),
        (Reduce("var"), "var"),
        (Reduce("std"), "std"),
        (Reduce("logsumexp"), "logsumexp"),
        (
            Reduce("extremum"),
            "amax amin",
        ),
        (Extremum("extremum"), "max min median mode"),
        (Extremum("other"), "argmax argmin"),
        (Reduce("other"), "all prod"),
        (AlongAxis(), "softmax _softmax log_softmax _log_softmax cummax cummin cumprod"),
        (AlongAxis(linear=True), "cumsum"),
        # -- shapes
        (Reshape("size"), "view _unsafe_view"),
        (Reshape("shape"), "reshape"),
        (Reshape("sizes"), "unflatten"),
        (Reshape(), "flatten ravel"),
        (
            Permute(),
            "permute transpose t swapaxes swapdims movedim moveaxis numpy_T mT",
        ),
        (PinnedAxis(("all",), "its bits are read as another dtype"), "view.dtype"),
        (Unsqueeze(), "unsqueeze"),
        (Squeeze(), "squeeze"),
        (Expand("size"), "expand broadcast_to"),
        (Expand(), "expand_as"),
        (Repeat(), "repeat"),
        (RepeatInterleave(), "repeat_interleave"),
        # -- cutting and joining
        (Slice(), "slice"),
        (Narrow(), "narrow"),
        (GatedHalves(), "glu"),
        (Select(), "select"),
        (Split(), "split split_with_sizes chunk tensor_split unbind unsafe_split unsafe_chunk"),
        (Cat(), "cat concat concatenate"),
        (Stack(), "stack"),
        # -- positions
        (OverPositions(1), "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d"),
        (
            OverPositions(2),
            "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d "
            "_adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d "
            "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
            "_upsample_nearest_exact2d",
        ),
        (OverPositions(3), "max_pool3d avg_pool3d adaptive_avg_pool3d upsample_trilinear3d"),
        (PixelShuffle(), "pixel_shuffle pixel_unshuffle"),
        # -- creation
        (Filled(), "full new_full"),
        (Filled(0.0), "zeros new_zeros"),
        (Filled(1.0), "ones new_ones"),
        (FilledLike(), "full_like"),
        (FilledLike(0.0), "zeros_like"),
        (FilledLike(1.0), "ones_like"),
        (Numbered(), "arange eye linspace scalar_tensor"),
        *further_rows(),
    ]
    return MappingProxyType({name: rule for rule, text in rows for name in _names(text)})


@functools.cache
def _getitem() -> Rule:
    from torchlathe.ir.axes.rules.slicing import GetItem

    return GetItem()


def rule_of(node: fx.Node) -> Rule | None:
    """The rule of a call node; None if there is none."""
    name, built_in = _built_in(node.target)
    return _registered.get(name, built_in)


@functools.cache  # every family asks for the rule of every node that it touches
def _built_in(target: Any) -> tuple[str, Rule | None]:
    """Schema name of what a node calls, and the rule that it has from the start."""
    if target is operator.getitem:
        return "", _getitem()
    schema = getattr(target, "_schema", None)
    if schema is None:
        return "", None
    name = schema.name
    # Some overloads are another op: ``max.other`` is elementwise, ``max.dim`` reduces.
    overload = _table().get(f"{name}.{schema.overload_name}")
    return name, overload or _table().get(name)


def ruled_ops() -> list[str]:
    """Schema names of all ops that have a rule, sorted."""
    return sorted({*_table(), *_registered})


def register_rule(name: str, rule: Rule) -> None:
    """Give a (custom) op its axis rule.

    Args:
        name: Schema name, for instance ``"mylib::my_op"``.
        rule: What is known about the op. A rule for an op that has one replaces it.
    """
    if "::" not in name:
        raise ValueError(f'an op is named "namespace::name", not {name!r}')
    _registered[name] = rule
