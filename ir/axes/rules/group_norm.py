"""Group norm: statistics over groups of channels, which a correction keeps when channels go."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import divide, is_static
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    ZERO,
    Layout,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    with_arguments,
)
from torchlathe.ir.axes.rules.normalization import affine_value
from torchlathe.ir.axes.rules.reduction import correct_means
from torchlathe.ir.axes.terms import ONE, Mismatch, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize
    from torchlathe.ir.edit import Edit

__all__ = ["GroupNorm"]

aten = torch.ops.aten


class GroupNorm(Rule):
    """``group_norm`` of ``[batch, channels, *positions]``.

    Channels are ``groups x inner``. Whole groups go as they are. An inner index goes from every
    group, and the moments go on counting its zeros. Where the channels' structure has no such
    factors (a concatenation whose pieces are no multiples of a group), any channel may go: the
    moments of each group are then summed by a table of which channel was in which group.
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Weight and bias have the channels; positions are fixed."""
        terms = ax.terms(node.args[0])
        groups = argument(node, "num_groups")
        channels = terms[1]
        ax.pin_all(terms[2:], "group norm takes its statistics over it")
        for name in ("weight", "bias"):
            parameter = argument(node, name)
            if isinstance(parameter, fx.Node):
                ax.unify(channels, ax.terms(parameter)[0])
        inner = divide(channels.extent, groups)
        letters: dict[str, Term] = {}
        if inner == 1:
            letters = {"g": channels, "i": ONE}
        elif groups == 1:
            letters = {"g": ONE, "i": channels}
        elif inner is not None:
            try:
                outer, rest = ax.solver.split(channels, inner)
                letters = {"g": outer, "i": rest}
            except Mismatch:
                if not is_static(channels.extent):
                    ax.pin(channels, "group norm has groups of a dynamic number of channels")
        ax.layouts[node] = Layout(letters=letters)
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A group of zeros has no influence; zeros among other channels are counted on."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        letters = flow.letters(node)
        irregular = not flow.layout(node).letters
        row: list[Value | None] = [None] * flow.rank(node)
        for axis in range(len(row)):
            value = flow.value(source, axis)
            if value is None:
                continue
            if axis != 1:
                # A row of zeros normalises to zeros, and then the bias is added.
                plain = not isinstance(argument(node, "bias"), fx.Node)
                row[axis] = ZERO if value.is_zero and plain else UNKNOWN
                continue
            within = irregular or "i" in letters
            if within and value.is_zero:
                flow.correct(node, "mean and variance still count the erased zeros")
            elif within:
                flow.lose(node, "it normalises over indices that are not zero")
            alone = ZERO if value.is_zero and not within else UNKNOWN
            row[axis] = affine_value(node, flow, 0, normalised=alone)
        return tuple(row)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The number of groups; and where zeros are still counted, the norm in the open."""
        letters = resize.layout(node).letters
        channels = resize.terms(node)[1]
        if not letters:
            if resize.touched(channels):
                _Irregular(node, resize).write()
            return
        groups = argument(node, "num_groups")
        new = resize.extent(letters["g"])
        if new != groups:
            resize.edit.set_args(node, *with_arguments(node, {"num_groups": new}))
        share = resize.share(letters["i"])
        if node in resize.corrected and share != 1.0:
            _Regular(node, resize).write(new, resize.extent(letters["i"]), share)


class _InTheOpen:
    """A group norm that is written out, in float32 for half-precision inputs as the fused one."""

    def __init__(self, node: fx.Node, resize: Resize) -> None:
        self.node, self.resize = node, resize
        self.edit: Edit = resize.edit
        self.dtype = node.meta["val"].dtype
        self.low = self.dtype in (torch.float16, torch.bfloat16)
        self.positions = list(range(2, node.meta["val"].dim()))
        x = node.args[0]
        assert isinstance(x, fx.Node)
        wide = self.call(aten.to.dtype, x, torch.float32) if self.low else x
        # The fused op gives contiguous results, which a view behind it may rely on.
        self.x = self.call(aten.contiguous.default, wide)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.edit.call(target, args, kwargs, like=self.node, before=self.node)

    def rsqrt(self, var: fx.Node) -> fx.Node:
        eps = argument(self.node, "eps", 1e-5)
        return self.call(aten.rsqrt.default, self.call(aten.add.Tensor, var, eps))

    def spread(self, x: fx.Node) -> fx.Node:
        """With an axis of extent 1 for each position."""
        for _ in self.positions:
            x = self.call(aten.unsqueeze.default, x, -1)
        return x

    def finish(self, normalised: fx.Node) -> None:
        """Scale, shift, and take the fused op's place."""
        result = normalised
        for target, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            parameter = argument(self.node, name)
            if isinstance(parameter, fx.Node):
                if self.low:
                    parameter = self.call(aten.to.dtype, parameter, torch.float32)
                result = self.call(target, result, self.spread(parameter))
        if self.low:
            result = self.call(aten.to.dtype, result, self.dtype)
        self.edit.replace(self.node, result)


class _Regular(_InTheOpen):
    """Every group lost the same inner indices."""

    def write(self, groups: int, inner: int, share: float) -> None:
        """Moments over ``[groups, inner, *positions]``, corrected as in `correct_means`."""
        split = self.call(aten.unflatten.int, self.x, 1, [groups, inner])
        dims = [2, *(p + 1 for p in self.positions)]
        moments = self.call(aten.var_mean.correction, split, dims, correction=0, keepdim=True)
        var = self.call(operator.getitem, moments, 0)
        mean = self.call(operator.getitem, moments, 1)
        centred = self.call(aten.sub.Tensor, split, mean)
        normalised = self.call(aten.mul.Tensor, centred, self.rsqrt(var))
        self.finish(self.call(aten.flatten.using_ints, normalised, 1, 2))
        correct_means(moments, share, self.resize, "var_mean")


class _Irregular(_InTheOpen):
    """Any channels went; a table says which group each of the others was in.

    With M[c, g] = 1 where channel c was in group g, of I channels each:
    mean_g = sum_c M[c, g] mean_c / I and
    var_g = sum_c M[c, g] var_c / I + (sum_c M[c, g] mean_c^2 / I - mean_g^2),
    where erased channels, which were zero, add nothing to any sum (own; the law of total
    variance). The bracket is taken in float64, since it is a difference of squares.
    """

    def write(self) -> None:
        """Moments of each channel, then of each group, and back to its channels."""
        table, inner = self._table()
        mean, var = self._of_channels()
        mean = self.call(aten.to.dtype, mean, torch.float64)
        table = self.call(aten.to.dtype, table, torch.float64)
        back = self.call(aten.t.default, table)

        def total(x: fx.Node) -> fx.Node:
            return self.call(aten.div.Tensor, self.call(aten.matmul.default, x, table), inner)

        group_mean = total(mean)
        squares = total(self.call(aten.mul.Tensor, mean, mean))
        square = self.call(aten.mul.Tensor, group_mean, group_mean)
        group_var = self.call(aten.sub.Tensor, squares, square)
        if var is not None:
            var = self.call(aten.to.dtype, var, torch.float64)
            group_var = self.call(aten.add.Tensor, group_var, total(var))
        group_var = self.call(aten.clamp_min.default, group_var, 0.0)
        dtype = torch.float32 if self.low else self.dtype

        def each(x: fx.Node) -> fx.Node:
            moved = self.call(aten.matmul.default, x, back)
            return self.spread(self.call(aten.to.dtype, moved, dtype))

        centred = self.call(aten.sub.Tensor, self.x, each(group_mean))
        self.finish(self.call(aten.mul.Tensor, centred, each(self.rsqrt(group_var))))

    def _of_channels(self) -> tuple[fx.Node, fx.Node | None]:
        """Mean and variance of each channel over the positions, if there are any."""
        if not self.positions:
            return self.x, None
        moments = self.call(
            aten.var_mean.correction, self.x, self.positions, correction=0, keepdim=False
        )
        var = self.call(operator.getitem, moments, 0)
        return self.call(operator.getitem, moments, 1), var

    def _table(self) -> tuple[fx.Node, int]:
        """``M`` over the channels that are left, and how many a group had (I)."""
        node, resize = self.node, self.resize
        groups: Any = argument(node, "num_groups")
        channels = resize.terms(node)[1].extent
        stays = resize.mask(resize.terms(node)[1])
        assert stays is not None, "a channel was erased"
        inner = channels // groups
        group = torch.arange(channels)[stays] // inner
        table = torch.nn.functional.one_hot(group, groups).to(torch.float32)
        program = self.edit.program
        name, count = f"{node.name}_groups", 1
        while name in {*program.entries, *program.aliases, *program.carried, *program.dropped}:
            name, count = f"{node.name}_groups{count}", count + 1
        like = next(iter(program.entries.values())).tensor
        made = self.edit.add_tensor(name, table.to(like.device))
        # The original has no such tensor.
        self.edit.record_zeroed(name, 0, torch.zeros(0, dtype=torch.int64))
        return made, inner
