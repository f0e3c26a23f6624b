"""Padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.extents import is_static, same
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    Layout,
    Terms,
    Value,
    Values,
    argument,
    join,
    with_arguments,
)
from torchlathe.ir.axes.rules.shaping import Structural
from torchlathe.ir.axes.terms import Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["Pad"]


class Pad(Structural):
    """``pad`` and its like: constants end to end with an axis, or fixed positions.

    Constants around a static axis are units that hold that constant: a shortcut may pad the
    channels of its input with zeros. Whatever else changes an axis (reflection, cropping, a dynamic
    extent) needs every index of it.
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """``[left | axis | right]``; axes that are not padded pass through."""
        terms = ax.terms(node.args[0])
        amounts = self.amounts(node, len(terms))
        layout = Layout()
        out: list[Term] = []
        for axis, (term, extent) in enumerate(zip(terms, ax.shape(node), strict=True)):
            before, after = amounts[axis]
            if before is not None and same(before, 0) and same(after, 0):
                out.append(term)
            elif before is None or not self._constant(node) or not is_static(term.extent):
                ax.pin(term, "it is padded")
                new = ax.fresh(extent)
                ax.pin(new, "it is padded")
                out.append(new)
            else:
                pieces = [term]
                for side, amount in ((0, before), (1, after)):
                    if amount:
                        piece = ax.fresh(amount)
                        layout.letters[f"{axis}:{side}"] = piece
                        pieces.insert(side * len(pieces), piece)
                out.append(ax.solver.concat(pieces))
        ax.layouts[node] = layout
        return tuple(out)

    @staticmethod
    def amounts(node: fx.Node, rank: int) -> list[tuple[Any, Any]]:
        """Per axis, how much is added before and after; None where that is cut or dynamic."""
        pad: Any = argument(node, "pad", argument(node, "padding"))
        found: list[tuple[Any, Any]] = [(0, 0)] * rank
        for place in range(len(pad) // 2):
            both = pad[2 * place], pad[2 * place + 1]
            known = all(isinstance(amount, int) and amount >= 0 for amount in both)
            found[rank - 1 - place] = both if known else (None, None)
        return found

    @staticmethod
    def _constant(node: fx.Node) -> bool:
        name = node.target._schema.name  # type: ignore[union-attr]
        plain = name in ("aten::pad", "aten::constant_pad_nd")
        return plain and argument(node, "mode", "constant") == "constant"

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Per axis the constant, what was there, or both; other padded axes mix it in."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        constant = self._constant(node)
        fill = Value(float(argument(node, "value") or 0.0))
        padded = {int(name.partition(":")[0]) for name in flow.letters(node)}
        amounts = self.amounts(node, flow.rank(node))
        changed = {a for a, (x, y) in enumerate(amounts) if x is None or x or y}
        out: list[Value | None] = []
        for axis in range(flow.rank(node)):
            if not flow.on(node, axis):
                out.append(None)
                continue
            here = flow.value(source, axis)
            found = [v for v in (fill if axis in padded else None, here) if v is not None]
            value = join(found) if found else UNKNOWN
            mixed = constant and bool(changed - {axis}) and value != fill
            out.append(UNKNOWN if mixed and not value.singular else value)
        return tuple(out)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """How much is added."""
        letters = resize.layout(node).letters
        pad: Any = argument(node, "pad")
        new = list(pad or ())
        rank = len(resize.terms(node))
        for letter, piece in letters.items():
            axis, side = map(int, letter.split(":"))
            new[2 * (rank - 1 - axis) + side] = resize.extent(piece)
        if new != list(pad or ()):
            resize.edit.set_args(node, *with_arguments(node, {"pad": new}))
