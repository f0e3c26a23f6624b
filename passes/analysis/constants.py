"""Which nodes hold one constant everywhere once some tensors are zero.

The axis terms' flow asks this of single indices of an axis; here it is asked of whole tensors,
which is what erasing an operator needs. Zeros pass convolutions, linear layers, norms whose own
parameters are zero, products, sums, pooling and resizing; a sigmoid makes one half of them, and
what is not known to hold one value counts as unknown.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterable
from typing import Any

from torch import fx

from torchlathe.ir.axes import UNKNOWN, ZERO, Pointwise, Value, rule_of
from torchlathe.ir.axes.rule import SINGULAR, argument
from torchlathe.ir.axes.rules.pointwise import evaluate

__all__ = ["constants_with", "op_name"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Elements are only moved, repeated or left out, so that any constant stays what it is.
_MOVES = _words(
    "view _unsafe_view reshape flatten ravel unflatten permute transpose t swapaxes swapdims "
    "movedim moveaxis numpy_T mT unsqueeze squeeze expand broadcast_to expand_as repeat tile "
    "repeat_interleave slice narrow select index index_select gather take_along_dim unfold "
    "split chunk split_with_sizes tensor_split unbind unsafe_split unsafe_chunk roll flip rot90 "
    "pixel_shuffle pixel_unshuffle channel_shuffle diagonal getitem as_strided "
    "max_pool1d max_pool2d max_pool3d amax amin "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d "
    "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
# Overloads of these names that do something else.
_NO_MOVES = frozenset({"aten.view.dtype", "aten.repeat_interleave.Tensor"})
# Linear in their first operand alone, or with f(0) = 0 otherwise.
_KEEP_ZEROS = _words(
    "sum mean cumsum cumprod norm linalg_vector_norm avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d im2col "
    "col2im grid_sampler prelu glu tril triu"
)
# Products: zero if any of these factors is, and the addend too where there is one.
_PRODUCTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("input", "weight"), ("bias",)),
    **{
        f"conv{how}{rank}d": (("input", "weight"), ("bias",))
        for how in ("", "_transpose")
        for rank in (1, 2, 3)
    },
    "convolution": (("input", "weight"), ("bias",)),
    "mm": (("self", "mat2"), ()),
    "bmm": (("self", "mat2"), ()),
    "mv": (("self", "vec"), ()),
    "dot": (("self", "tensor"), ()),
    "outer": (("self", "vec2"), ()),
    "matmul": (("self", "other"), ()),
    "addmm": (("mat1", "mat2"), ("self",)),
    "baddbmm": (("batch1", "batch2"), ("self",)),
    "scaled_dot_product_attention": (("value",), ()),
    "embedding": (("weight",), ()),
}
_NORMS = _words("batch_norm layer_norm group_norm instance_norm rms_norm")
# Their first result is normalised, and the others are moments.
_SEVERAL = _words(
    "_native_batch_norm_legit_no_training _batch_norm_no_update native_batch_norm "
    "native_layer_norm native_group_norm cudnn_batch_norm"
)

_Known = dict[fx.Node, Value]


def op_name(node: fx.Node) -> str:
    """The op's name without namespace and overload, ``"conv2d"``; of a builtin its own name."""
    return _op_name(node.target)


@functools.cache
def _op_name(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(getattr(target, "__name__", target))
    namespace, _, name = str(schema.name).partition("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def constants_with(zero: Collection[fx.Node], nodes: Iterable[fx.Node]) -> dict[fx.Node, float]:
    """The nodes that hold one constant everywhere if some tensors are zero.

    Args:
        zero: Placeholders of tensors whose elements are all zero.
        nodes: Nodes to visit, in execution order; whatever else they read counts as unknown.

    Returns:
        The constant, by node; nodes that are not in it may hold anything.
    """
    known: _Known = dict.fromkeys(zero, ZERO)
    for node in nodes:
        if node.op != "call_function":
            continue
        used = node.all_input_nodes
        if any(n in known for n in used):
            # Not even a product with zero is zero where something divided by zero.
            singular = any(n in known and known[n].singular for n in used)
            value = SINGULAR if singular else _value(node, known)
            if value.singular or value.constant is not None:
                known[node] = value
    return {node: v.constant for node, v in known.items() if v.constant is not None}


def _value(node: fx.Node, known: _Known) -> Value:
    name = op_name(node)
    if name in _MOVES and str(node.target) not in _NO_MOVES:
        return UNKNOWN if _is_moment(node) else _of(node.args[0], known)
    if name in _KEEP_ZEROS:
        return ZERO if _is_zero(node.args[0], known) else UNKNOWN
    if name in _PRODUCTS:
        factors, addends = _PRODUCTS[name]
        none = any(_is_zero(argument(node, factor), known) for factor in factors)
        added = [argument(node, addend) for addend in addends]
        return ZERO if none and all(_absent(a, known) for a in added) else UNKNOWN
    if name in _NORMS or name in _SEVERAL:
        return _norm(node, known)
    if name in ("cat", "concat", "concatenate", "stack"):
        return _same([_of(part, known).constant for part in argument(node, "tensors")])
    if name in ("pad", "constant_pad_nd"):
        return _padded(node, known)
    rule = rule_of(node)
    return _pointwise(node, rule, known) if isinstance(rule, Pointwise) else UNKNOWN


def _is_moment(node: fx.Node) -> bool:
    source: Any = node.args[0]
    several = op_name(node) == "getitem" and op_name(source) in _SEVERAL
    return several and node.args[1] not in (0,)


def _of(argument: Any, known: _Known) -> Value:
    return known.get(argument, UNKNOWN) if isinstance(argument, fx.Node) else UNKNOWN


def _is_zero(argument: Any, known: _Known) -> bool:
    return _of(argument, known).is_zero


def _absent(argument: Any, known: _Known) -> bool:
    """Whether an addend adds nothing."""
    return argument is None or _is_zero(argument, known)


def _same(constants: Iterable[float | None]) -> Value:
    found = set(constants)
    return Value(found.pop()) if len(found) == 1 else UNKNOWN


def _norm(node: fx.Node, known: _Known) -> Value:
    """Zero weights or centred zeros leave the bias; batch norm of zeros is centred elsewhere."""
    if not _absent(argument(node, "bias"), known):
        return UNKNOWN
    own_moments = op_name(node) in ("layer_norm", "group_norm", "rms_norm")
    nothing = own_moments and argument(node, "eps") != 0 and _is_zero(node.args[0], known)
    return ZERO if nothing or _is_zero(argument(node, "weight"), known) else UNKNOWN


def _padded(node: fx.Node, known: _Known) -> Value:
    inside = _of(node.args[0], known)
    mode = argument(node, "mode", "constant")
    fill = argument(node, "value", 0.0) or 0.0
    return inside if mode != "constant" or inside.constant == fill else UNKNOWN


def _pointwise(node: fx.Node, rule: Pointwise, known: _Known) -> Value:
    if rule.zero == "identity":
        value = _of(node.args[0], known)
        floating = node.meta["val"].is_floating_point()
        return value if floating or value.is_zero else UNKNOWN
    used = node.all_input_nodes
    if rule.zero == "product" and any(_is_zero(n, known) for n in used):
        return ZERO
    if rule.zero == "branches":
        return _same(_number(a, known) for a in node.args[1:3])
    if op_name(node) == "masked_fill":
        return _same(_number(node.args[i], known) for i in (0, 2))
    if rule.zero == "quotient" and _is_zero(node.args[1], known):
        return SINGULAR
    if any(n not in known for n in used):
        return UNKNOWN
    return evaluate(node, {n: known[n] for n in used})


def _number(argument: Any, known: _Known) -> float | None:
    if isinstance(argument, int | float):
        return float(argument)
    return _of(argument, known).constant
