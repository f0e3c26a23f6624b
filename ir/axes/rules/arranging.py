"""Ops that arrange elements anew: grids, diagonals, shuffled channels, common shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.extents import divide, same
from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    Layout,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    with_arguments,
)
from torchlathe.ir.axes.rules.shaping import Reshape, Structural, first_operand, zeros_or_unknown
from torchlathe.ir.axes.rules.slicing import Cat
from torchlathe.ir.axes.terms import ONE, Mismatch, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = [
    "BroadcastTensors",
    "ChannelShuffle",
    "Copy",
    "Diagonal",
    "MeshGrid",
    "ReshapeAs",
    "Rot90",
    "StackAlong",
]


class ReshapeAs(Reshape):
    """``view_as``, ``reshape_as``: the sizes are those of another tensor."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Regrouped, and of the other tensor's terms, which give the sizes from then on."""
        terms = ax.reshape(ax.terms(node.args[0]), ax.shape(node))
        for term, other in zip(terms, ax.terms(argument(node, "other")), strict=True):
            ax.unify(term, other)
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of the first tensor."""
        return first_operand(node, flow)


class Copy(Rule):
    """``copy``: another tensor, expanded to the shape of the first."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The first tensor's terms."""
        terms = ax.terms(node.args[0])
        return ax.broadcast([terms, ax.terms(argument(node, "src"))], len(terms))

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What is copied."""
        source = argument(node, "src")
        rank, lead = flow.rank(node), flow.rank(node) - flow.rank(source)
        return tuple(
            (flow.value(source, axis - lead) if axis >= lead else None) or UNKNOWN
            if flow.on(node, axis)
            else None
            for axis in range(rank)
        )


class BroadcastTensors(Rule):
    """``broadcast_tensors``: each operand in the common shape."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The common terms, for every result."""
        sources: Any = node.args[0]
        values = node.meta["val"]
        terms = list(ax.broadcast([ax.terms(s) for s in sources], values[0].dim()))
        for axis, dim in enumerate(values[0].shape):
            if is_one(terms[axis]) and not same(dim, 1):
                terms[axis] = ax.fresh(dim)
        return [tuple(terms) for _ in values]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What each operand holds, where it has the axis."""
        sources: Any = node.args[0]
        rows: list[tuple[Value | None, ...]] = []
        for place, source in enumerate(sources):
            own = flow.index.axes(node, place)
            lead = len(own) - flow.rank(source)
            rows.append(
                tuple(
                    (flow.value(source, axis - lead) if axis >= lead else None) or UNKNOWN
                    if flow.on(node, axis, place)
                    else None
                    for axis in range(len(own))
                )
            )
        return rows


class MeshGrid(Rule):
    """``meshgrid``: every vector along an axis of its own."""

    @staticmethod
    def _axis(node: fx.Node, place: int) -> int:
        """The axis of a vector; the first two are exchanged in Cartesian indexing."""
        swapped = argument(node, "indexing", "ij") == "xy" and place < 2
        count = len(node.args[0])  # type: ignore[arg-type]
        return 1 - place if swapped and count > 1 else place

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The vectors' terms, for every result."""
        sources: Any = node.args[0]
        out: list[Term] = [ONE] * len(sources)
        for place, source in enumerate(sources):
            terms = ax.terms(source)
            out[self._axis(node, place)] = terms[0] if terms else ONE
        return [tuple(out) for _ in node.meta["val"]]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A vector's values along its own axis."""
        sources: Any = node.args[0]
        unknown = flow.unknown(node)
        assert isinstance(unknown, list)
        for place, source in enumerate(sources):
            axis = self._axis(node, place)
            row = list(unknown[place])
            if row[axis] is not None and flow.rank(source):
                row[axis] = flow.value(source, 0)
            unknown[place] = tuple(row)
        return unknown


class Rot90(Structural):
    """``rot90``: two axes change places and directions."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The other axes pass."""
        terms = list(ax.terms(node.args[0]))
        dims: Any = argument(node, "dims")
        first, second = (d % len(terms) for d in dims)
        ax.pin_all((terms[first], terms[second]), "its indices change places")
        if argument(node, "k", 1) % 2:
            terms[first], terms[second] = terms[second], terms[first]
        return tuple(terms)


class Diagonal(Rule):
    """``diagonal``, ``diag_embed`` and ``diag``: one axis is read from two, or spread over them.

    On the main diagonal of a square the three are one; off it they are fixed.
    """

    @staticmethod
    def _embeds(node: fx.Node) -> bool:
        name = str(node.target._schema.name)  # type: ignore[union-attr]
        source: Any = node.args[0]
        return name == "aten::diag_embed" or (
            name == "aten::diag" and source.meta["val"].dim() == 1
        )

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The axes that are not on the diagonal pass."""
        terms = list(ax.terms(node.args[0]))
        embeds = self._embeds(node)
        rank = len(terms) + 1 if embeds else len(terms)
        places = argument(node, "dim1", 0) % rank, argument(node, "dim2", 1) % rank
        straight = argument(node, "offset", argument(node, "diagonal", 0)) == 0
        if embeds:
            axis = terms.pop()
            if not straight:
                ax.pin(axis, "it is put beside a diagonal")
                axis = ax.fresh(ax.shape(node)[places[0]])
                ax.pin(axis, "it holds a diagonal")
            for place in sorted(places):
                terms.insert(place, axis)
            return tuple(terms)
        first, second = (terms[place] for place in places)
        rest = [term for axis, term in enumerate(terms) if axis not in places]
        if straight and same(first.extent, second.extent):
            return (*rest, ax.unify(first, second))
        ax.pin_all((first, second), "its diagonal is read")
        new = ax.fresh(ax.shape(node)[-1])
        ax.pin(new, "it is read from a diagonal")
        return (*rest, new)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Zero where it was; beside an embedded diagonal there are zeros."""
        return zeros_or_unknown(node, flow)


class ChannelShuffle(Structural):
    """``channel_shuffle``: ``groups x channels`` becomes ``channels x groups``."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The factors change places."""
        terms = list(ax.terms(node.args[0]))
        axis = len(terms) - 3 if len(terms) > 2 else 0
        inner = divide(terms[axis].extent, argument(node, "groups"))
        if inner is None:
            raise Mismatch(f"{argument(node, 'groups')} groups of {terms[axis].extent}")
        outer, rest = ax.split(terms[axis], inner)
        terms[axis] = ax.solver.product((rest, outer))
        ax.layouts[node] = Layout(letters={"g": outer})
        return tuple(terms)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The number of groups."""
        outer = resize.layout(node).letters["g"]
        if resize.touched(outer):
            new = {"groups": resize.extent(outer)}
            resize.edit.set_args(node, *with_arguments(node, new))


@dataclass(frozen=True)
class StackAlong(Cat):
    """``hstack``, ``vstack``, ``dstack``, ``column_stack``: cat along a fixed axis.

    Attributes:
        axis: The axis.
        rank: Least number of axes; operands with fewer get axes of extent 1.
        last: Whether a vector becomes a column, rather than a row.
    """

    axis: int
    rank: int
    column: bool = False

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The concatenation of the operands, in at least so many axes."""
        sources: Any = node.args[0]
        rows = [self._raised(ax.terms(s)) for s in sources]
        dim = min(self.axis, len(rows[0]) - 1)
        out: list[Term] = []
        for axis in range(len(rows[0])):
            terms = [row[axis] for row in rows]
            if axis == dim:
                out.append(ax.solver.concat(terms))
                continue
            for other in terms[1:]:
                ax.unify(terms[0], other)
            out.append(terms[0])
        return tuple(out)

    def _raised(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """As ``atleast_nd`` does it; one axis becomes (1, n), (n, 1) or (1, n, 1)."""
        missing = self.rank - len(terms)
        if missing <= 0:
            return terms
        if self.rank == 3:
            return {0: (ONE, ONE, ONE), 1: (ONE, *terms, ONE), 2: (*terms, ONE)}[len(terms)]
        return (*terms, *[ONE] * missing) if self.column else (*[ONE] * missing, *terms)
