"""Norms and similarities of vectors along an axis, and weights that are normalised by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import (
    SINGULAR,
    UNKNOWN,
    ZERO,
    Layout,
    Rule,
    Terms,
    Value,
    Values,
    argument,
)
from torchlathe.ir.axes.rules.shaping import Structural, zeros_or_unknown
from torchlathe.ir.axes.terms import ONE
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["Renorm", "Similarity", "WeightNorm"]


@dataclass(frozen=True)
class Similarity(Rule):
    """``cosine_similarity`` and its like: two tensors, compared along one axis.

    Attributes:
        any_zero: Whether an index may go where one of them is zero; else both have to be.
        kept: Whether the axis stays, and is fixed (``cross``).
        last: Whether it is the last axis, whatever the arguments say.
        exact: Whether zeros add nothing; not so where a constant is added to each difference.
    """

    any_zero: bool = False
    kept: bool = False
    last: bool = False
    exact: bool = True

    def _dim(self, node: fx.Node, rank: int) -> int:
        return rank - 1 if self.last else argument(node, "dim", -1) % rank

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The operands broadcast; the axis goes, or is fixed."""
        operands = [ax.terms(a) for a in node.args[:2]]
        rank = max(map(len, operands))
        terms = list(ax.broadcast(operands, rank))
        dim = self._dim(node, rank)
        if self.kept:
            ax.pin(terms[dim], "its components are mixed")
        elif argument(node, "keepdim", False):
            terms[dim] = ONE
        else:
            del terms[dim]
        return tuple(terms)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Indices along the axis may go if they add nothing."""
        rows = [self._values(node, operand, flow) for operand in node.args[:2]]
        rank = len(rows[0])
        dim = self._dim(node, rank)
        out: list[Value | None] = []
        for axis in range(rank):
            found = [row[axis] for row in rows if row[axis] is not None]
            zeros = [v is not None and v.is_zero for v in found]
            enough = any(zeros) if self.any_zero else all(zeros) and len(zeros) == 2
            if axis == dim and not self.kept:
                if found and not (enough and self.exact):
                    flow.lose(node, "it sums over indices that are not zero")
                continue
            zero = any(zeros) if self.kept or self.any_zero else False
            out.append((ZERO if zero else UNKNOWN) if found else None)
        unknown = flow.unknown(node)
        assert isinstance(unknown, tuple)
        if len(out) < len(unknown):  # keepdim
            out.insert(dim, None)
        return tuple(out)

    @staticmethod
    def _values(node: fx.Node, operand: object, flow: Flow) -> list[Value | None]:
        """The values of an operand, per axis of the common shape."""
        assert isinstance(operand, fx.Node)
        rank = max(flow.rank(n) for n in node.args[:2] if isinstance(n, fx.Node))
        own = [flow.value(operand, axis) for axis in range(flow.rank(operand))]
        return [None] * (rank - len(own)) + own

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """The axis that goes."""
        if self.kept:
            return set()
        rank = max(n.meta["val"].dim() for n in node.args[:2] if isinstance(n, fx.Node))
        axis = self._dim(node, rank) - rank + operand.meta["val"].dim()
        return {axis} if axis >= 0 else set()


class Renorm(Rule):
    """``renorm``: each slice along an axis is scaled down to a greatest norm."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The shape does not change."""
        return ax.terms(node.args[0])

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Inside of a slice only zeros may go."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim = argument(node, "dim") % flow.rank(source)
        for axis in range(flow.rank(source)):
            value = flow.value(source, axis)
            if axis != dim and value is not None and not value.is_zero:
                flow.lose(node, "its norm is over indices that are not zero")
        return zeros_or_unknown(node, flow)


class WeightNorm(Structural):
    """``_weight_norm``: ``w = g v / |v|``, with a norm for each index of one axis.

    Along that axis the scale ``g`` alone says what is zero, since ``v = 0`` would divide by zero.
    Indices of other axes, of inputs that are only read, are part of the norm; when they go, the
    scale takes the share that they had: ``g' = g |v'| / |v|`` (own).
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The direction's terms; the scale has those that its norms are not over."""
        direction, scale = ax.terms(argument(node, "v")), ax.terms(argument(node, "g"))
        for term, own in zip(direction, scale, strict=False):
            if not is_one(own):
                ax.unify(term, own)
        if isinstance(node.meta["val"], torch.Tensor):
            return direction
        return [direction, scale]

    @staticmethod
    def _dim(node: fx.Node) -> int | None:
        """The axis that has norms of its own; None if there is one norm for all."""
        dim = argument(node, "dim", 0)
        rank = argument(node, "v").meta["val"].dim()
        return None if dim == -1 else dim % rank

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What is zero in the direction or the scale; the norm's share is made up for."""
        direction, scale = argument(node, "v"), argument(node, "g")
        dim = self._dim(node)
        row: list[Value | None] = []
        for axis in range(flow.rank(direction)):
            value = flow.value(direction, axis)
            if value is None:
                row.append(None)
            elif axis == dim:
                by = flow.value(scale, axis) if axis < flow.rank(scale) else None
                zero = by is not None and by.is_zero
                row.append(SINGULAR if value.is_zero else ZERO if zero else UNKNOWN)
            else:
                row.append(ZERO if value.is_zero else UNKNOWN)
                if not value.is_zero:
                    self._missed(node, flow)
        unknown = flow.unknown(node)
        return [tuple(row), *unknown[1:]] if isinstance(unknown, list) else tuple(row)

    @staticmethod
    def _missed(node: fx.Node, flow: Flow) -> None:
        operands = [argument(node, name) for name in ("v", "g")]
        if all(info(o).tensor is not None and len(o.users) == 1 for o in operands):
            flow.correct(node, "the norm of a weight still counts the erased columns")
        else:
            flow.lose(node, "its norm is over indices that are not zero")

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """The direction does not say what is zero along the axis with norms of its own."""
        dim = self._dim(node)
        return {dim} if operand is argument(node, "v") and dim is not None else set()

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Give the scale the share that the norm has lost."""
        if node not in resize.corrected:
            return
        program = resize.edit.program
        v, g = (info(argument(node, name)).tensor for name in ("v", "g"))
        assert v is not None
        assert g is not None
        now, scale = program.entries[v].tensor.detach(), program.entries[g].tensor.detach()
        before = resize.twin(v)
        if isinstance(now, FakeTensor) or isinstance(before, FakeTensor):
            return  # captured without values: the shapes are all that there is
        dim = self._dim(node)
        old, new = _norms(before, dim), _norms(now, dim)
        if (
            dim is not None
            and (mask := resize.mask(resize.terms(argument(node, "v"))[dim])) is not None
        ):
            old = old.index_select(dim, mask.nonzero().flatten().to(old.device))
        share = torch.where(old > 0, new / old, 1.0).reshape(scale.shape)
        resize.edit.set_tensor(g, (scale.double() * share).to(scale.dtype), rewrites=False)


def _norms(weight: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Norms of the slices along an axis, in float64, with the other axes at extent 1."""
    others = [axis for axis in range(weight.dim()) if axis != dim]
    norms: torch.Tensor = torch.linalg.vector_norm(weight.double(), dim=others, keepdim=True)
    return norms
