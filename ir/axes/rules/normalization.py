"""Normalisations with their parameters: layer, RMS, batch and instance norm."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import same
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    ZERO,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    with_arguments,
)
from torchlathe.ir.axes.rules.reduction import correct_means
from torchlathe.ir.extents import expression
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["BatchNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "affine_value"]

aten = torch.ops.aten


def affine_value(node: fx.Node, flow: Flow, axis: int, *, normalised: Value) -> Value:
    """What ``normalised * weight + bias`` holds at the erased indices of a parameter's axis."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    scaled = normalised
    if isinstance(weight, fx.Node):
        value = flow.value(weight, axis)
        if value is not None and value.is_zero:
            scaled = ZERO
    if isinstance(bias, fx.Node):
        value = flow.value(bias, axis)
        if value is None or not value.is_zero:
            return UNKNOWN
    return scaled


class LayerNorm(Rule):
    """``layer_norm``: the last axes are normalised, then scaled and shifted index by index."""

    how = "mean and variance still count the erased zeros"
    # What a zero becomes before the weight.
    normalised_zero = UNKNOWN

    def normalised(self, node: fx.Node) -> int:
        """Number of axes that are normalised."""
        shape: Any = argument(node, "normalized_shape")
        return len(shape)

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Weight and bias have the normalised axes."""
        terms = ax.terms(node.args[0])
        count = self.normalised(node)
        for name in ("weight", "bias"):
            parameter = argument(node, name)
            if isinstance(parameter, fx.Node):
                for own, term in zip(ax.terms(parameter), terms[-count:], strict=True):
                    ax.unify(term, own)
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Zeros in the normalised axes change the statistics, which a correction makes up for."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank, count = flow.rank(source), self.normalised(node)
        out: list[Value | None] = []
        for axis in range(rank):
            value = flow.value(source, axis)
            if value is None:
                out.append(None)
            elif axis >= rank - count:
                if value.is_zero:
                    flow.correct(node, self.how)
                else:
                    flow.lose(node, "it normalises over indices that are not zero")
                normalised = self.normalised_zero if value.is_zero else UNKNOWN
                out.append(affine_value(node, flow, axis - rank + count, normalised=normalised))
            else:
                # A row of zeros normalises to zeros, and then the bias is added.
                plain = not isinstance(argument(node, "bias"), fx.Node)
                out.append(ZERO if value.is_zero and plain else UNKNOWN)
        return tuple(out)

    def _share(self, node: fx.Node, resize: Resize) -> float:
        share = 1.0
        for term in resize.terms(node)[-self.normalised(node) :]:
            share *= resize.share(term)
        return share

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The normalised shape; and where zeros are still counted, the norm in the open."""
        count = self.normalised(node)
        terms = resize.terms(node)[-count:]
        if not any(map(resize.touched, terms)):
            return
        shape = [resize.extent(t) for t in terms]
        resize.edit.set_args(node, *with_arguments(node, {"normalized_shape": shape}))
        share = self._share(node, resize)
        if node in resize.corrected and share != 1.0:
            self._correct(node, share, count, resize)

    def _correct(self, node: fx.Node, share: float, count: int, resize: Resize) -> None:
        """Write the norm as ``(x - mean) * rsqrt(var + eps) * w + b`` with corrected moments.

        The fused op has no argument for the divisor, and centring by another mean cannot be
        folded into its weight. (CompensatedLayerNorm, arXiv 2606.14346; the moments as in
        `correct_means`.)
        """
        edit = resize.edit
        x = node.args[0]
        assert isinstance(x, fx.Node)
        dtype = node.meta["val"].dtype
        low = dtype in (torch.float16, torch.bfloat16)

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return edit.call(target, args, kwargs, like=node, before=node)

        # The fused op computes in float32 for half-precision inputs, and so does this.
        wide = call(aten.to.dtype, x, torch.float32) if low else x
        if not _same_strides(edit.stands_for.get(x, x), node):
            # The fused op gives contiguous results, which a view behind it may rely on.
            wide = call(aten.contiguous.default, wide)
        dims = list(range(-count, 0))
        moments = call(aten.var_mean.correction, wide, dims, correction=0, keepdim=True)
        var, mean = call(operator.getitem, moments, 0), call(operator.getitem, moments, 1)
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, var, argument(node, "eps", 1e-5)))
        result = call(aten.mul.Tensor, call(aten.sub.Tensor, wide, mean), scale)
        for target, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            parameter = argument(node, name)
            if isinstance(parameter, fx.Node):
                result = call(target, result, parameter)
        if low:
            result = call(aten.to.dtype, result, dtype)
        correct_means(moments, share, resize, "var_mean")
        edit.replace(node, result)


def _same_strides(a: fx.Node, b: fx.Node) -> bool:
    strides = zip(a.meta["val"].stride(), b.meta["val"].stride(), strict=True)
    return all(same(expression(p), expression(q)) for p, q in strides)


class RMSNorm(LayerNorm):
    """``rms_norm``: as layer norm, without a mean and without a bias."""

    how = "the mean square still counts the erased zeros"
    normalised_zero = ZERO

    def _correct(self, node: fx.Node, share: float, count: int, resize: Resize) -> None:
        """``w' = w sqrt(C/C')`` and ``eps' = eps C/C'`` (own; sum(x^2) / C is unchanged).

        A weight that is read elsewhere too keeps its value, and the result is scaled instead.
        """
        edit = resize.edit
        eps = argument(node, "eps")
        if eps is None:
            eps = torch.finfo(torch.promote_types(node.meta["val"].dtype, torch.float32)).eps
        edit.set_args(node, *with_arguments(node, {"eps": eps / share}))
        weight = argument(node, "weight")
        factor = share**-0.5
        name = info(weight).tensor if isinstance(weight, fx.Node) else None
        if name is not None and len(weight.users) == 1:
            scaled = edit.program.entries[name].tensor.detach() * factor
            edit.set_tensor(name, scaled, rewrites=False)
            return
        edit.replace(node, edit.call(aten.mul.Tensor, (node, factor), like=node))


class BatchNorm(Rule):
    """Batch norm with its running statistics: one scale and shift per channel."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Every per-channel tensor has the channel's term."""
        terms = ax.terms(node.args[0])
        for operand in node.all_input_nodes:
            if operand is not node.args[0]:
                for own in ax.terms(operand):
                    ax.unify(terms[1], own)
        values = node.meta["val"]
        if isinstance(values, torch.Tensor):
            return terms
        # The saved statistics: empty in inference, per channel otherwise.
        return [terms, *((terms[1],) if v.numel() else (ax.fresh(0),) for v in values[1:])]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A channel with zero scale and shift is zero, and so is one of zeros by its own mean."""
        training = argument(node, "training", False) or argument(node, "train", False)
        rank = len(flow.index.axes(node.args[0]))  # type: ignore[arg-type]
        row: list[Value | None] = [None] * rank
        for axis in range(rank):
            value = flow.value(node.args[0], axis)  # type: ignore[arg-type]
            if value is not None:
                plain = ZERO if training and value.is_zero else UNKNOWN
                row[axis] = affine_value(node, flow, 0, normalised=plain) if axis == 1 else UNKNOWN
                if training and axis != 1:
                    flow.lose(node, "batch statistics are taken over it")
        if isinstance(node.meta["val"], torch.Tensor):
            return tuple(row)
        unknown = flow.unknown(node)
        assert isinstance(unknown, list)
        return [tuple(row), *unknown[1:]]


class InstanceNorm(BatchNorm):
    """``instance_norm``: each channel by its own statistics over the positions."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """As batch norm, with positions that must all stay."""
        terms = super().infer(node, ax)
        ax.pin_all(ax.terms(node.args[0])[2:], "instance norm takes its statistics over it")
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A channel of zeros normalises to zeros by its own statistics."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        own = bool(argument(node, "use_input_stats"))
        row: list[Value | None] = []
        for axis in range(flow.rank(source)):
            value = flow.value(source, axis)
            if value is None:
                row.append(None)
            elif axis == 1:
                plain = ZERO if own and value.is_zero else UNKNOWN
                row.append(affine_value(node, flow, 0, normalised=plain))
            else:
                row.append(UNKNOWN)
        return tuple(row)
