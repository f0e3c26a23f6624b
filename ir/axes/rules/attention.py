"""Scaled dot-product attention as one op."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import fx

from torchlathe.ir.axes.extents import divide
from torchlathe.ir.axes.inference import is_one
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

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["Attention"]


class Attention(Rule):
    """``softmax(scale q k^T + mask) v`` with q ``[*, n, d]``, k ``[*, m, d]``, v ``[*, m, e]``."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Leading axes are shared; with ``enable_gqa`` the heads of q are ``kv heads x repeat``."""
        q, k, v = (ax.terms(a) for a in node.args[:3])
        ax.unify(q[-1], k[-1])
        ax.unify(k[-2], v[-2])
        if argument(node, "is_causal", False):
            ax.pin_all((q[-2], k[-2]), "a causal mask numbers its positions")
        heads = q[:-2]
        if argument(node, "enable_gqa", False) and len(q) > 2:
            repeat = divide(q[-3].extent, k[-3].extent)
            # What is left of a group still divides into groups, so either factor may shrink.
            kv_heads, _ = ax.split(q[-3], repeat)
            ax.unify(kv_heads, k[-3])
            ax.unify(k[-3], v[-3])
            heads = (*ax.broadcast([q[:-3], k[:-3], v[:-3]], len(q) - 3), q[-3])
        else:
            rank = max(len(t) for t in (q, k, v)) - 2
            heads = ax.broadcast([q[:-2], k[:-2], v[:-2]], rank)
        mask = argument(node, "attn_mask")
        if isinstance(mask, fx.Node):
            ax.broadcast([(*heads, q[-2], k[-2]), ax.terms(mask)], len(heads) + 2)
        return (*heads, q[-2], v[-1])

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Scores ignore a head dimension that is zero in q or k; the result follows v."""
        q, k, v = node.args[:3]
        assert isinstance(q, fx.Node)
        assert isinstance(k, fx.Node)
        assert isinstance(v, fx.Node)
        rank = flow.rank(node)
        inner = [flow.value(q, flow.rank(q) - 1), flow.value(k, flow.rank(k) - 1)]
        if any(x is not None for x in inner) and not any(x and x.is_zero for x in inner):
            flow.lose(node, "scores sum over head dimensions that are not zero")
        if flow.value(k, flow.rank(k) - 2) is not None:
            flow.lose(node, "every key takes part in the softmax")
        out: list[Value | None] = []
        for axis in range(rank):
            if not flow.on(node, axis):
                out.append(None)
                continue
            index = axis - rank + flow.rank(v)
            value = flow.value(v, index) if index >= 0 and axis != rank - 2 else None
            out.append(ZERO if value is not None and value.is_zero else UNKNOWN)
        return tuple(out)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The default scale is one over the root of the head dimension that there was."""
        q = node.args[0]
        assert isinstance(q, fx.Node)
        term = resize.terms(q)[-1]
        if resize.touched(term) and argument(node, "scale") is None and not is_one(term):
            scale = 1.0 / math.sqrt(term.extent)
            resize.edit.set_args(node, *with_arguments(node, {"scale": scale}))
