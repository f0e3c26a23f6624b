"""Table look-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from torchlathe.ir.axes.rule import Rule, Terms, Values, argument
from torchlathe.ir.axes.rules.passing import Passing

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Embedding", "EmbeddingBag"]


class Embedding(Rule):
    """``embedding``: rows are picked by value, so only columns can go."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The indices' axes, then the columns."""
        rows, columns = ax.terms(argument(node, "weight"))
        ax.pin(rows, "its rows are looked up by the values of a tensor")
        return (*ax.terms(argument(node, "indices")), columns)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A zero column gives a zero column."""
        unknown = flow.unknown(node)
        assert isinstance(unknown, tuple)
        column = flow.value(argument(node, "weight"), 1)
        return (*unknown[:-1], column)


_MAX = 2


class EmbeddingBag(Passing):
    """``embedding_bag``: sums, means or maxima of rows that are picked by value."""

    def __init__(self) -> None:
        super().__init__(
            "weight[r!, c]; indices[*i!]; offsets[o!]; per_sample_weights[*j!] -> [g, c]",
            "its rows are looked up in bags by the values of a tensor",
            ("weight",),
        )

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The columns pass; for maxima the last result has a place for each of them."""
        terms = super().infer(node, ax)
        if argument(node, "mode", 0) == _MAX:
            assert isinstance(terms, list)
            first, places = terms[0], terms[-1]
            assert first is not None
            assert places is not None
            terms[-1] = (*places[:-1], first[-1])
        return terms
