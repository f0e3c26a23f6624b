"""Ops that read at places which tensors give: ``index``, ``gather``, ``index_select``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import same
from torchlathe.ir.axes.rule import UNKNOWN, Terms, Values, argument
from torchlathe.ir.axes.rules.shaping import Structural
from torchlathe.ir.axes.terms import Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Gather", "Index", "IndexSelect", "Places"]

BY_VALUE = "its indices are picked by the values of a tensor"
BY_MASK = "its indices are picked by a mask"


@dataclass(frozen=True)
class Places:
    """What ``x[i, :, j]`` does to the axes of ``x``.

    Attributes:
        rest: Axes of ``x`` that are not indexed, in order.
        at: How many of them stand before the index axes in ``x[...]``.
        index: Terms of the index axes; None where a mask makes one.
    """

    rest: tuple[int, ...]
    at: int
    index: tuple[Term | None, ...]

    @staticmethod
    def of(node: fx.Node, ax: Inference) -> Places:
        """Read the indices of a node, and pin what they pick from."""
        terms = ax.terms(node.args[0])
        indices: Any = list(argument(node, "indices"))
        indexed: list[int] = []
        rows: list[tuple[Term, ...]] = []
        masked = False
        axis = 0
        for index in indices:
            if index is None:
                axis += 1
                continue
            own = ax.terms(index)
            mask = index.meta["val"].dtype in (torch.bool, torch.uint8)
            span = len(own) if mask else 1
            reason = BY_MASK if mask else BY_VALUE
            ax.pin_all(terms[axis : axis + span], reason)
            indexed += range(axis, axis + span)
            axis += span
            if mask:
                ax.pin_all(own, "it is a mask that picks indices")
                masked = True
            else:
                rows.append(own)
        rest = tuple(a for a in range(len(terms)) if a not in indexed)
        together = indexed == list(range(indexed[0], indexed[-1] + 1))
        rank = max([*map(len, rows), int(masked)])
        index_terms: tuple[Term | None, ...] = ax.broadcast(rows, rank) if rows else (None,)
        if masked:
            index_terms = (*index_terms[:-1], None)
        return Places(rest, indexed[0] if together else 0, index_terms)

    def result_axes(self) -> tuple[int, ...]:
        """Per axis in ``rest``, where it stands in ``x[...]``."""
        count = len(self.index)
        return tuple(i if i < self.at else i + count for i in range(len(self.rest)))


class Index(Structural):
    """``x[i, :, j]`` with index tensors: the indexed axes are fixed, the others pass through."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Index axes broadcast and stand where the first of them was, or in front."""
        terms = ax.terms(node.args[0])
        places = Places.of(node, ax)
        shape = ax.shape(node)
        found: list[Term] = []
        for position, term in enumerate(places.index):
            if term is None:
                term = ax.fresh(shape[places.at + position])
                ax.pin(term, "it has as many indices as a mask has true values")
            found.append(term)
        rest = [terms[axis] for axis in places.rest]
        return (*rest[: places.at], *found, *rest[places.at :])

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What is picked from; the index tensors hold positions, not values."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        values = flow.values(source)
        unknown = flow.unknown(node)
        assert isinstance(unknown, tuple)
        if len(values) != 1:
            return unknown
        return tuple(None if v is None else values[0] for v in unknown)


class IndexSelect(Structural):
    """``index_select``: one axis is picked from by a vector."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The vector's axis takes the place of the axis that it picks from."""
        terms = list(ax.terms(node.args[0]))
        index = ax.terms(argument(node, "index"))
        if not terms:
            return ()
        dim = argument(node, "dim") % len(terms)
        ax.pin(terms[dim], BY_VALUE)
        terms[dim] = index[0] if index else ax.fresh(1)
        return tuple(terms)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of the axes that pass."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim = argument(node, "dim") % max(1, flow.rank(source))
        return _passed(node, source, dim, flow)


class Gather(Structural):
    """``gather`` and ``take_along_dim``: picked along one axis, for each place of the others."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The axis that is picked from is fixed; the others are those of the index too."""
        terms = ax.terms(node.args[0])
        index = ax.terms(node.args[1] if _take(node) else argument(node, "index"))
        dim = argument(node, "dim")
        if dim is None or len(terms) != len(index):
            ax.pin_all((*terms, *index), BY_VALUE)
            fresh = tuple(ax.fresh(e) for e in ax.shape(node))
            ax.pin_all(fresh, BY_VALUE)
            return fresh
        dim %= max(1, len(terms))
        out: list[Term] = []
        for axis, (term, own, extent) in enumerate(zip(terms, index, ax.shape(node), strict=True)):
            if axis == dim:
                ax.pin(term, BY_VALUE)
                out.append(own)
            elif same(term.extent, own.extent):
                out.append(ax.unify(term, own))
            elif _take(node):  # broadcasts
                out.append(term if same(term.extent, extent) else own)
            else:
                ax.pin_all((term, own), "only the first indices of it are picked from")
                out.append(own)
        return tuple(out)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of the axes that pass; the index holds places."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dim = argument(node, "dim")
        if dim is None:
            return flow.unknown(node)
        return _passed(node, source, dim % max(1, flow.rank(source)), flow)


def _take(node: fx.Node) -> bool:
    return bool(node.target._schema.name == "aten::take_along_dim")  # type: ignore[union-attr]


def _passed(node: fx.Node, source: fx.Node, dim: int, flow: Flow) -> Values:
    """The source's values, but for one axis."""
    unknown = flow.unknown(node)
    assert isinstance(unknown, tuple)
    return tuple(
        value if value is None or axis == dim else flow.value(source, axis) or UNKNOWN
        for axis, value in enumerate(unknown)
    )
