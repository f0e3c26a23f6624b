"""Affine maps that stand one after the other, and what two of them are together.

Everything is computed in float64 and rounded once, when the result is written.

Source: own; the rewriting is the linear operator reordering of Hector (arXiv 2301.06284) for static
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info

__all__ = ["AffineMap", "composable", "compose", "read_map"]

Kind = Literal["linear", "convolution", "scale", "embedding"]

aten = torch.ops.aten
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True, eq=False)
class AffineMap:
    """One call, or several in turn, as ``x -> W x + b`` on each row (or position).

    Attributes:
        kind: What computes it; ``"scale"`` multiplies each channel by a number.
        shape: Of the weight: (outs, ins), (outs, ins / groups, *kernel), (channels,), or (rows,
            outs) of an embedding.
        biased: Whether it adds something.
        calls: The calls that it stands for, in order.
        window: The call whose stride, padding, dilation and groups it has.
        plain: Whether a convolution is 1 x 1 at every position, without groups and padding.
        padded: Whether a convolution reads zeros beyond the border.
        groups: Of a convolution.
    """

    kind: Kind
    shape: tuple[int, ...]
    biased: bool
    calls: tuple[fx.Node, ...]
    window: fx.Node
    plain: bool = False
    padded: bool = False
    groups: int = 1

    @property
    def parameters(self) -> int:
        """Elements of its weight; of a scale with its shift."""
        count = 2 if self.kind == "scale" else 1
        for extent in self.shape:
            count *= extent
        return count


def read_map(program: Program, call: fx.Node) -> AffineMap | None:
    """What a call is as a map of static weights; None if it is none."""
    names = [_static(program, node) for node in _operands(call)]
    if not names or any(name is None or name in program.frozen for name in names):
        return None
    value = call.meta["val"]
    if call.target is aten.batch_norm.default:
        if call.args[5] or not _known_channels(call):
            return None
        channels = int(value.shape[1])
        return AffineMap("scale", (channels,), True, (call,), call)
    weight: Any = call.args[0 if call.target is aten.embedding.default else 1]
    shape = tuple(int(extent) for extent in weight.meta["val"].shape)
    biased = argument(call, "bias") is not None
    if call.target is aten.linear.default:
        return AffineMap("linear", shape, biased, (call,), call)
    if call.target is aten.matmul.default:
        return AffineMap("linear", (shape[1], shape[0]), False, (call,), call)
    if call.target is aten.embedding.default:
        return AffineMap("embedding", shape, False, (call,), call)
    groups = int(argument(call, "groups", 1))
    padded = any(_list(argument(call, "padding", 0)))
    ones = set(shape[2:]) <= {1} and set(_list(argument(call, "stride", 1))) <= {1}
    plain = ones and groups == 1 and not padded
    return AffineMap("convolution", shape, biased, (call,), call, plain, padded, groups)


def _operands(call: fx.Node) -> list[Any]:
    """The arguments that have to be tensors of the model; none for other calls."""
    if call.target is aten.batch_norm.default:
        return [node for node in call.args[1:5] if node is not None]
    if call.target is aten.embedding.default:
        return [call.args[0]]
    if call.target in (aten.linear.default, *_CONVOLUTIONS):
        bias = argument(call, "bias")
        return [call.args[1], *([] if bias is None else [bias])]
    if call.target is aten.matmul.default:
        weight: Any = call.args[1]
        two = isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2
        data: Any = call.args[0]
        return [weight] if two and data.meta["val"].dim() >= 2 else []
    return []


def _known_channels(call: fx.Node) -> bool:
    """Whether a norm has its statistics, and as many channels as they say."""
    mean: Any = call.args[3]
    value = call.meta["val"]
    return mean is not None and value.dim() >= 2 and int(mean.meta["val"].shape[0]) > 0


def _static(program: Program, node: Any) -> str | None:
    name = info(node).tensor if isinstance(node, fx.Node) else None
    if name is None or program.entries[name].kind is TensorKind.CONSTANT:
        return None
    return name if program.entries[name].tensor.is_floating_point() else None


def _list(value: Any) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value]


# -- two in one --------------------------------------------------------------------------------


def composable(first: AffineMap, second: AffineMap) -> AffineMap | None:
    """The map that two in turn are, without its weights; None where no call computes it."""
    calls = (*first.calls, *second.calls)
    biased = first.biased or second.biased
    both = (first.kind, second.kind)
    shape: tuple[int, ...]
    if both == ("linear", "linear"):
        return AffineMap("linear", (second.shape[0], first.shape[1]), biased, calls, second.window)
    if both == ("embedding", "linear"):
        shape = (first.shape[0], second.shape[0])
        return AffineMap("embedding", shape, False, calls, first.window)
    if both == ("scale", "scale"):
        return replace(second, calls=calls)
    if second.kind == "scale":
        # A norm sees channels on axis 1; a linear layer gives them on the last.
        fits = first.kind == "convolution" or second.window.meta["val"].dim() == 2
        taken = first.kind in ("convolution", "linear") and fits
        return replace(first, biased=True, calls=calls) if taken else None
    if first.kind == "scale":
        fits = second.kind == "linear" and first.window.meta["val"].dim() == 2
        conv = second.kind == "convolution" and not second.padded and second.groups == 1
        return replace(second, biased=True, calls=calls) if fits or conv else None
    if both == ("convolution", "convolution"):
        if second.plain and first.groups == 1:
            shape = (second.shape[0], *first.shape[1:])
            return replace(first, shape=shape, biased=biased, calls=calls, plain=False)
        # Zeros beyond the border would have to be the first bias there.
        if first.plain and second.groups == 1 and not (first.biased and second.padded):
            shape = (second.shape[0], first.shape[1], *second.shape[2:])
            return replace(second, shape=shape, biased=biased, calls=calls)
    return None


Values = tuple[torch.Tensor, torch.Tensor | None]


def compose(program: Program, maps: Sequence[AffineMap]) -> Values:
    """Weight and bias of several maps in turn, in float64."""
    kind, values = maps[0].kind, _values(program, maps[0])
    for following in maps[1:]:
        values = _two(kind, values, following.kind, _values(program, following))
        kind = following.kind if kind == "scale" else kind
    return values


def _values(program: Program, single: AffineMap) -> Values:
    call = single.window

    def value(node: Any) -> torch.Tensor | None:
        name = info(node).tensor if isinstance(node, fx.Node) else None
        return None if name is None else program.tensor(name).detach().double()

    if single.kind == "scale":
        gain, shift, mean, variance = (value(node) for node in call.args[1:5])
        assert mean is not None
        assert variance is not None
        eps: Any = call.args[7]
        scale = (variance + eps).rsqrt()
        scale = scale if gain is None else scale * gain
        moved = -mean * scale
        return scale, moved if shift is None else moved + shift
    weight = value(call.args[0 if single.kind == "embedding" else 1])
    assert weight is not None
    if call.target is aten.matmul.default:
        return weight.T, None
    return weight, None if single.kind == "embedding" else value(argument(call, "bias"))


def _two(first: str, one: Values, second: str, other: Values) -> Values:
    (a, shift), (b, added) = one, other
    if first == "embedding":
        table = a @ b.T
        return (table if added is None else table + added), None
    if second == "scale":
        weight = a * b.reshape(-1, *[1] * (a.dim() - 1))
        return weight, _sum(None if shift is None else shift * b, added)
    if first == "scale":
        weight = b * a.reshape(1, -1, *[1] * (b.dim() - 2))
    elif first == "linear":
        weight = b @ a
    elif all(extent == 1 for extent in b.shape[2:]):
        weight = torch.einsum("or,ri...->oi...", b.flatten(1), a)
    else:
        weight = torch.einsum("or...,ri->oi...", b, a.flatten(1))
    passed = None if shift is None else b.flatten(2).sum(2) @ shift if b.dim() > 2 else b @ shift
    return weight, _sum(passed, added)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
