"""Ops of which some axes must stay as they are, while the others pass through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from torchlathe.ir.axes.extents import same
from torchlathe.ir.axes.rule import Rule, Terms, Values, argument
from torchlathe.ir.axes.rules.reduction import Reduce, reduced_axes
from torchlathe.ir.axes.rules.shaping import Structural, first_operand, zeros_or_unknown
from torchlathe.ir.axes.terms import Term
from torchlathe.ir.extents import expression

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Extremum", "Opaque", "PinnedAxis", "PinnedTail"]

Keeps = Literal["values", "zeros", "nothing"]


def kept(node: fx.Node, flow: Flow, keeps: Keeps) -> Values:
    """Values of the first result by what the op keeps of its first operand; others unknown."""
    unknown = flow.unknown(node)
    if keeps == "nothing":
        return unknown
    found = first_operand(node, flow) if keeps == "values" else zeros_or_unknown(node, flow)
    return [found[0], *unknown[1:]] if isinstance(unknown, list) else found  # type: ignore[list-item]


@dataclass(frozen=True)
class PinnedAxis(Structural):
    """Ops that need every index of some axes: ``roll``, ``flip``, ``sort``, ``diff``, ``fft``.

    All other axes pass through. Axes of the result that have another extent, and those at the end
    that the operand does not have, are new and fixed.

    Attributes:
        names: Arguments that name the axes.
        reason: Why their indices must stay.
        keeps: What is known of the first result: "values" are moved, "zeros" stay zeros while
            anything else may change, or "nothing".
        tail: How many of the last axes are meant where the arguments name none; None for all.
    """

    names: tuple[str, ...]
    reason: str
    keeps: Keeps = "values"
    tail: int | None = None

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The same terms, some of them pinned."""
        terms = ax.terms(node.args[0])
        chosen = self.chosen(node, len(terms))
        ax.pin_all([terms[d] for d in chosen], self.reason)
        for other in node.all_input_nodes:
            if other is not node.args[0]:
                self._other(ax, terms, ax.terms(other), chosen)
        values = node.meta["val"]
        if isinstance(values, torch.Tensor):
            return self._result(ax, terms, values, chosen)
        return [self._result(ax, terms, v, chosen) for v in values]

    def chosen(self, node: fx.Node, rank: int) -> set[int]:
        """The axes that must stay."""
        dims: list[int] = []
        for name in self.names:
            found: Any = argument(node, name)
            dims += found if isinstance(found, list | tuple) else [] if found is None else [found]
        if dims:
            return {d % rank for d in dims} if rank else set()
        sizes: Any = argument(node, "s")  # sizes of an fft, for as many of the last axes
        count = len(sizes) if isinstance(sizes, list | tuple) else self.tail
        return set(range(rank)) if count is None else set(range(rank - count, rank))

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Values change places; what ``sort`` and its like say about places is not known."""
        value = node.meta["val"]
        source: Any = node.args[0]
        if isinstance(value, torch.Tensor) and value.dtype != source.meta["val"].dtype:
            return kept(node, flow, "zeros" if self.keeps == "zeros" else "nothing")
        return kept(node, flow, self.keeps)

    def _other(
        self, ax: Inference, terms: tuple[Term, ...], other: tuple[Term, ...], chosen: set[int]
    ) -> None:
        """Further operands lie beside the first along the axes that pass."""
        if len(other) != len(terms):
            ax.pin_all(other, self.reason)
            return
        for axis, (term, own) in enumerate(zip(terms, other, strict=True)):
            if axis in chosen:
                ax.pin(own, self.reason)
            else:
                ax.unify(term, own)

    def _result(
        self, ax: Inference, terms: tuple[Term, ...], value: torch.Tensor, chosen: set[int]
    ) -> tuple[Term, ...]:
        """Axes that changed their extent (``topk``) or are new (``unfold``) are fixed."""
        out = []
        for axis, dim in enumerate(value.shape):
            known = axis < len(terms)
            if known and not (axis in chosen and not same(expression(dim), terms[axis].extent)):
                out.append(terms[axis])
                continue
            out.append(ax.fresh(dim))
            ax.pin(out[-1], self.reason)
        return tuple(out)


@dataclass(frozen=True)
class PinnedTail(Rule):
    """Ops on the last axes of all operands, for each index of the leading ones by itself.

    Leading axes broadcast and pass through; the others are fixed before and after.

    Attributes:
        tail: How many of the last axes the op works on.
        reason: Why their indices must stay.
        zeros: Whether the first result is zero along a leading axis where all operands are.
    """

    tail: int
    reason: str
    zeros: bool = False

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Leading axes pass."""
        leads = []
        for operand in node.all_input_nodes:
            terms = ax.terms(operand)
            cut = max(0, len(terms) - self.tail)
            ax.pin_all(terms[cut:], self.reason)
            leads.append(terms[:cut])
        lead = ax.broadcast(leads, max(map(len, leads), default=0))
        values = node.meta["val"]
        if isinstance(values, torch.Tensor):
            return self._result(ax, lead, values)
        return [self._result(ax, lead, v) for v in values]

    def _result(
        self, ax: Inference, lead: tuple[Term, ...], value: torch.Tensor
    ) -> tuple[Term, ...]:
        fresh = tuple(ax.fresh(d) for d in value.shape[len(lead) :])
        ax.pin_all(fresh, self.reason)
        return (*lead, *fresh)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Zeros along a leading axis stay zeros where the op is linear."""
        return kept(node, flow, "zeros" if self.zeros else "nothing")


@dataclass(frozen=True)
class Opaque(Rule):
    """Ops that need every axis as it is.

    Attributes:
        reason: Why.
    """

    reason: str

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """New axes, which are fixed as are those of the operands."""
        for operand in node.all_input_nodes:
            for terms in ax.results(operand):
                ax.pin_all(terms or (), self.reason)
        fresh = ax.fresh_results(node)
        for terms in fresh if isinstance(fresh, list) else [fresh]:
            ax.pin_all(terms or (), self.reason)
        return fresh

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Nothing is known."""
        return flow.unknown(node)


@dataclass(frozen=True)
class Extremum(Reduce):
    """Reductions that tell where a value was found: ``argmax``, and ``max`` along an axis.

    A place is a number, and erasing an index would give those behind it another one. Where nothing
    reads the places, they do not matter.
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """As a reduction; the reduced axes are fixed if their places are read."""
        several = isinstance(node.meta["val"], list | tuple)
        read = any(user.args[1:] != (0,) for user in node.users)
        name = node.target._schema.name  # type: ignore[union-attr]
        if (several and read) or name.startswith("aten::arg"):
            terms = ax.terms(node.args[0])
            for axis in reduced_axes(node, len(terms)):
                ax.pin(terms[axis], "places along it are told by their number")
        return super().infer(node, ax)
