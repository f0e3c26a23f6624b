"""Linear maps in turn, associated or fused as is cheapest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from torchlathe.ir import Edit, Program, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.reordering.attention import find_single_heads, fuse_single_head
from torchlathe.passes.rewrite.reordering.chains import Segment, cut, find_chains
from torchlathe.passes.rewrite.reordering.maps import AffineMap, compose

__all__ = ["ReorderLinear"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ReorderLinear(RewritePass):
    """Fuses linear maps that follow one another where that takes fewer FLOPs.

    Keeps: the outputs (exactly; products of weights are computed in float64 and rounded once).
    Changes: BatchNorm in eval mode goes into the convolution or linear layer next to it, linear
    layers and convolutions without anything between them become one, and so does an embedding with
    the layer that alone reads it, wherever the cost model says that this is cheaper. In attention
    with one head, the projection of the outputs goes into that of the values.

    Source: own; the linear operator reordering of Hector (arXiv 2301.06284) for static weights.
    """

    name: ClassVar[str] = "reorder-linear"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    grow: bool = field(
        default=False,
        metadata={"help": "also where it takes more parameters, for fewer FLOPs"},
    )

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse a program without values.

        Raises:
            PreconditionError: There are no weights to multiply.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Find the chains, cut each where it is cheapest, and fuse the pieces."""
        heads = list(find_single_heads(program))
        if heads:
            with program.edit(by=ctx.spec) as edit:
                for head in heads:
                    fuse_single_head(edit, head)
        segments = [
            segment
            for chain in find_chains(program)
            for segment in cut(program, chain, grow=self.grow)
        ]
        notes = [head.diagnostic for head in heads]
        with program.edit(by=ctx.spec) as edit:
            for segment in segments:
                names = [_weight_name(single) or str(single.window) for single in segment.maps]
                ctx.report(f"fusing {', '.join(names)}")
                notes.append(_note(segment))
                _fuse(edit, segment)
        scales = sum(single.kind == "scale" for s in segments for single in s.maps)
        statistics: dict[str, int | float | str] = {
            "fused": sum(len(segment.maps) for segment in segments),
            "into": len(segments),
            "norms": scales,
            "heads": len(heads),
        }
        return PassResult(bool(segments or heads), statistics, notes)


def _note(segment: Segment) -> Diagnostic:
    kinds = [f"%{single.window.name}" for single in segment.maps]
    before = sum(single.parameters for single in segment.maps)
    return Diagnostic.at(
        segment.maps[-1].window,
        f"{', '.join(kinds)} became one: {before:,} parameters are {segment.whole.parameters:,}, "
        f"and {segment.saved:,.0f} operations go",
    )


def _fuse(edit: Edit, segment: Segment) -> None:
    program = edit.program
    weight, bias = compose(program, segment.maps)
    last = segment.maps[-1].window
    window = segment.whole.window
    if segment.whole.kind == "scale":
        _scale(edit, segment, weight, bias)
        return
    dtype = window.meta["val"].dtype
    main = [single for single in segment.maps if single.kind != "scale"]
    stem = _stem([_weight_name(single) or "" for single in main])
    alone = len(main) == 1
    node = _put(edit, _weight_node(main[0]) if alone else None, f"{stem}weight", weight.to(dtype))
    added = None
    if bias is not None:
        old = argument(main[0].window, "bias") if alone else None
        own = old if isinstance(old, fx.Node) and len(old.users) == 1 else None
        added = _put(edit, own, f"{stem}bias", bias.to(dtype))
    first: Any = segment.maps[0].window
    if segment.whole.kind == "embedding":
        args = (node, *first.args[1:])
        new = edit.call(aten.embedding.default, args, first.kwargs, like=first, before=last)
    else:
        data = first.args[0]
        rest = () if segment.whole.kind == "linear" else _window(window)
        target = aten.linear.default if segment.whole.kind == "linear" else window.target
        assert callable(target)
        tail = (added, *rest) if added is not None or rest else ()
        new = edit.call(target, (data, node, *tail), like=window, before=last)
    edit.replace(last, new)


def _scale(edit: Edit, segment: Segment, gain: torch.Tensor, shift: torch.Tensor | None) -> None:
    """Two norms in turn: the second one, with the first in its mean and gain."""
    last, first = segment.maps[-1].window, segment.maps[0].window
    dtype = last.meta["val"].dtype
    path, _, _ = (info(_node(last.args[3])).tensor or "").rpartition(".")
    stem = f"{path}." if path else ""
    ones = torch.ones_like(gain)
    eps: Any = last.args[7]
    parts = {
        "folded_gain": gain.to(dtype),
        "folded_shift": (torch.zeros_like(gain) if shift is None else shift).to(dtype),
        "folded_mean": torch.zeros_like(gain).to(dtype),
        "folded_variance": (ones - eps).to(dtype),
    }
    nodes = [
        _put(edit, None, f"{stem}{name}", value, buffer=name in ("folded_mean", "folded_variance"))
        for name, value in parts.items()
    ]
    args = (first.args[0], *nodes, *last.args[5:])
    new = edit.call(aten.batch_norm.default, args, like=last, before=last)
    edit.replace(last, new)


def _window(call: fx.Node) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a convolution."""
    spatial = _node(call.args[1]).meta["val"].dim() - 2
    ones, zeros = [1] * spatial, [0] * spatial
    return (
        argument(call, "stride", ones),
        argument(call, "padding", zeros),
        argument(call, "dilation", ones),
        argument(call, "groups", 1),
    )


def _put(
    edit: Edit, old: fx.Node | None, name: str, value: torch.Tensor, *, buffer: bool = False
) -> fx.Node:
    """Give a tensor a new value, or add one under a free name."""
    program = edit.program
    value = value.contiguous()
    if old is not None and len(old.users) == 1:
        known = info(old).tensor
        assert known is not None
        edit.set_tensor(known, value)
        return old
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    free, count = name, 1
    while free in taken:
        path, _, last = name.rpartition(".")
        free = f"{path}.{last}{count}" if path else f"{last}{count}"
        count += 1
    kind = TensorKind.BUFFER if buffer else TensorKind.PARAMETER
    node = edit.add_tensor(free, value, kind)
    program.rewritten |= {free}
    return node


def _weight_node(single: AffineMap) -> fx.Node:
    return _node(single.window.args[0 if single.kind == "embedding" else 1])


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


def _weight_name(single: AffineMap) -> str | None:
    return None if single.kind == "scale" else info(_weight_node(single)).tensor


def _stem(names: Sequence[str]) -> str:
    """What comes before ``weight``: the module that the weights have in common."""
    paths = [name.split(".")[:-1] for name in names]
    common = 0
    while all(len(p) > common for p in paths) and len({p[common] for p in paths}) == 1:
        common += 1
    return "".join(f"{part}." for part in paths[-1][: common or None])
