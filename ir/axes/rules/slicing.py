"""Ops that cut and join along an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import divide, is_static, same
from torchlathe.ir.axes.rule import Rule, Terms, Values, argument, with_arguments
from torchlathe.ir.axes.rules.shaping import Structural, zeros_or_unknown
from torchlathe.ir.axes.terms import Term
from torchlathe.ir.extents import expression

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = [
    "Cat",
    "GatedHalves",
    "GetItem",
    "Narrow",
    "Select",
    "Slice",
    "Split",
    "Stack",
]

_SPLIT = torch.ops.aten.split_with_sizes.default


class Slice(Structural):
    """``slice``: cuts an axis at its bounds."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The piece between the bounds; with a step, the outer factor of it."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", 0) % len(terms)
        term = terms[dim]
        result = ax.shape(node)[dim]
        if same(result, term.extent):
            return tuple(terms)
        if same(result, 0):
            terms[dim] = ax.fresh(0)
            return tuple(terms)
        bounds = self._bounds(node, term)
        if bounds is None or not is_static(term.extent):
            ax.pin(term, "it is cut at a dynamic position")
            terms[dim] = ax.fresh(result)
            ax.pin(terms[dim], "it is cut at a dynamic position")
            return tuple(terms)
        start, end = bounds
        step = argument(node, "step", 1)
        if start > 0:
            _, term = ax.cut(term, start)
        if end < terms[dim].extent:
            term, _ = ax.cut(term, end - start)
        if step != 1:
            if divide(end - start, step) is None:
                ax.pin(term, f"every {step}th index of it is taken")
                term = ax.fresh(result)
                ax.pin(term, "it was taken from another axis with a step")
            else:
                term, inner = ax.split(term, step)
                ax.pin(inner, f"every {step}th index of it is taken")
        terms[dim] = term
        return tuple(terms)

    @staticmethod
    def _bounds(node: fx.Node, term: Term) -> tuple[int, int] | None:
        start, end = argument(node, "start"), argument(node, "end")
        start = 0 if start is None else start
        extent = term.extent
        if not is_static(extent):
            return None
        end = extent if end is None else end
        if not (isinstance(start, int) and isinstance(end, int)):
            return None
        start = max(0, start + extent if start < 0 else min(start, extent))
        end = max(start, end + extent if end < 0 else min(end, extent))
        return start, end

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Bounds move with what is left before them."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        dim = argument(node, "dim", 0) % len(terms)
        term = terms[dim]
        if not resize.touched(term) or same(term.extent, resize.terms(node)[dim].extent):
            return
        bounds = self._bounds(node, term)
        assert bounds is not None, "a touched axis is static"
        start, end = (resize.position(term, b) for b in bounds)
        resize.edit.set_args(node, *with_arguments(node, self._moved(node, start, end)))

    def _moved(self, node: fx.Node, start: int, end: int) -> dict[str, int]:
        """New bounds as arguments."""
        return {"start": start, "end": end}


class Narrow(Slice):
    """``narrow``: a slice by its start and length."""

    @staticmethod
    def _bounds(node: fx.Node, term: Term) -> tuple[int, int] | None:
        start, length = argument(node, "start"), argument(node, "length")
        extent = term.extent
        if not (isinstance(start, int) and isinstance(length, int) and is_static(extent)):
            return None
        start = start + extent if start < 0 else start
        return start, start + length

    def _moved(self, node: fx.Node, start: int, end: int) -> dict[str, int]:
        return {"start": start, "length": end - start}


class GatedHalves(Structural):
    """``glu``: the first half of an axis times the sigmoid of the second."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The halves are the same indices, once as values and once as gates."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", -1) % len(terms)
        half = divide(terms[dim].extent, 2)
        values, gates = ax.cut(terms[dim], half)
        terms[dim] = ax.unify(values, gates)
        return tuple(terms)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A value of zero stays zero whatever its gate."""
        return zeros_or_unknown(node, flow)


class Select(Structural):
    """``select``: takes one index, so the axis stays as it is."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The other axes."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", 0) % len(terms)
        ax.pin(terms.pop(dim), "single indices of it are taken")
        return tuple(terms)


@dataclass(frozen=True)
class Split(Structural):
    """``split``, ``chunk``, ``split_with_sizes``, ``tensor_split``, ``unbind``, ``hsplit``.

    Attributes:
        axis: The axis, where the op does not name it; None where it does.
    """

    axis: int | None = None

    def _dim(self, node: fx.Node, rank: int) -> int:
        if self.axis is not None:
            return min(self.axis, rank - 1)
        return int(argument(node, "dim", 0)) % rank

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """One piece of the axis for each result."""
        terms = list(ax.terms(node.args[0]))
        dim = self._dim(node, len(terms))
        values = node.meta["val"]
        if node.target._schema.name == "aten::unbind":  # type: ignore[union-attr]
            ax.pin(terms.pop(dim), "single indices of it are taken")
            return [tuple(terms) for _ in values]
        rest = terms[dim]
        results: list[tuple[Term, ...] | None] = []
        for value in values[:-1]:
            piece, rest = ax.cut(rest, expression(value.shape[dim]))
            results.append((*terms[:dim], piece, *terms[dim + 1 :]))
        results.append((*terms[:dim], rest, *terms[dim + 1 :]))
        return results

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Sizes of the pieces, which need not be equal any more."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target._schema.name == "aten::unbind":  # type: ignore[union-attr]
            return
        terms = resize.terms(source)
        dim = self._dim(node, len(terms))
        if not resize.touched(terms[dim]):
            return
        sizes = [resize.extent(r[dim]) for r in resize.axis_map.results(node) if r is not None]
        if node.target is not _SPLIT:
            resize.edit.set_target(node, _SPLIT)
        resize.edit.set_args(node, (source, sizes, dim), {})


class GetItem(Rule):
    """One result of an op with several."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The terms of that result."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return ax.results(source)[index] or ()

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of that result."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return flow.result_values(source, index)


class Cat(Structural):
    """``cat``: concatenates along one axis, and unifies the others."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The concatenation of the pieces."""
        sources: Any = node.args[0]
        rank = node.meta["val"].dim()
        # Legacy: empty one-dimensional tensors are skipped by the op.
        rows = [t for s in sources if len(t := ax.terms(s)) == rank]
        dim = argument(node, "dim", 0) % rank
        out: list[Term] = []
        for axis in range(rank):
            terms = [row[axis] for row in rows]
            if axis == dim:
                out.append(ax.solver.concat(terms))
                continue
            for other in terms[1:]:
                ax.unify(terms[0], other)
            out.append(terms[0])
        return tuple(out)


class Stack(Structural):
    """``stack``: a new axis whose indices are the operands."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The operands' common terms with a fixed new axis."""
        sources: Any = node.args[0]
        rows = [ax.terms(s) for s in sources]
        dim = argument(node, "dim", 0) % (len(rows[0]) + 1)
        out = []
        for terms in zip(*rows, strict=True):
            for other in terms[1:]:
                ax.unify(terms[0], other)
            out.append(terms[0])
        new = ax.fresh(len(rows))
        ax.pin(new, "its indices are the operands of a stack")
        out.insert(dim, new)
        return tuple(out)
