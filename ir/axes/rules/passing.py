"""Ops whose axes can be written down: which ones pass, and which ones must stay."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from torchlathe.ir.axes.extents import divide, multiply
from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import UNKNOWN, ZERO, Layout, Rule, Terms, Value, Values, argument
from torchlathe.ir.axes.terms import ONE, Mismatch, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Passing"]

Axes = tuple[tuple[str, ...], ...]
_GROUP = re.compile(r"(\w*)\s*\[([^\]]*)\]")


@dataclass(frozen=True)
class Passing(Rule):
    """Axes in writing: ``"input[n, c, *s!]; grid[n, *p!, k!] -> [n, c, *p]"``.

    Operands are named as in the op's schema; those that are absent are skipped. The same letter is
    the same axis everywhere, of extent 1 where it broadcasts. ``*name`` stands for any number of
    axes. ``!`` marks axes that must stay, and letters that only the result has must stay too. Two
    names on one axis are a row-major product, of which the result or another operand tells one
    factor. Results beyond those in writing are positions: new and fixed.

    A letter that is not in the result is worked on by the op, so that its indices are missed
    unless all operands that have them hold zeros there.

    Attributes:
        text: The axes.
        reason: Why the marked axes must stay.
        zero: Operands that make the result zero where any of them is zero.
    """

    text: str
    reason: str = "the op needs every position"
    zero: tuple[str, ...] = ()

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The same letter is the same term everywhere."""
        layout = self._layout(node, ax)
        ax.layouts[node] = layout
        letters = layout.letters
        plain = [
            (t, a) for o, axes in layout.addends for t, a in zip(ax.terms(o), axes, strict=True)
        ]
        for term, names in plain:
            if len(names) == 1:
                known = letters.get(names[0], ONE)
                letters[names[0]] = term if is_one(known) else known
        values = node.meta["val"]
        first = values if isinstance(values, torch.Tensor) else values[0]
        shape = ax.shape(node) if first is values else tuple(first.shape)
        for names, extent in zip(layout.output, shape, strict=True):
            if len(names) == 1 and names[0] not in letters:
                letters[names[0]] = ax.fresh(extent)
        for term, names in plain:
            if is_one(term):
                continue
            if len(names) == 1:
                ax.unify(letters[names[0]], term)
            else:
                self._factor(letters, names, term, ax)
        out = []
        for names, extent in zip(layout.output, shape, strict=True):
            missing = [name for name in names if name not in letters]
            if missing:
                rest = multiply(letters[n].extent for n in names if n not in missing)
                letters[missing[0]] = ax.fresh(divide(extent, rest))
                for name in missing[1:]:
                    letters[name] = ONE
            out.append(ax.solver.product(letters[name] for name in names))
        for name in self._pinned(layout):
            ax.pin(letters[name], self.reason)
        if first is values:
            return tuple(out)
        return [tuple(out), *(self._positions(ax, v) for v in values[1:])]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Zeros of the operands that multiply; whatever is worked on must be zero."""
        layout = flow.layout(node)
        mine = flow.letters(node)
        multiplies = [argument(node, name) for name in self.zero]
        out = {name for axis in layout.output for name in axis}
        for name in mine - out:
            values = [v for _, v in self._held(layout, name, flow)]
            if not values or not all(v.is_zero for v in values):
                flow.lose(node, "it works over indices that are not zero")
        row: list[Value | None] = []
        for names in layout.output:
            here = mine & set(names)
            zero = [
                any(v.is_zero for o, v in self._held(layout, name, flow) if o in multiplies)
                for name in here
            ]
            row.append((ZERO if all(zero) else UNKNOWN) if here else None)
        unknown = flow.unknown(node)
        return [tuple(row), *unknown[1:]] if isinstance(unknown, list) else tuple(row)

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """Axes that are not in the result."""
        assert layout is not None
        out = {name for axis in layout.output for name in axis}
        found: set[int] = set()
        for used, axes in layout.addends:
            if used is operand:
                found |= {i for i, own in enumerate(axes) if not set(own) & out}
        return found

    @staticmethod
    def _held(layout: Layout, name: str, flow: Flow) -> list[tuple[fx.Node, Value]]:
        """What each operand holds at the erased indices of a letter."""
        return [
            (operand, value)
            for operand, axes in layout.addends
            for axis, own in enumerate(axes)
            if name in own and (value := flow.value(operand, axis)) is not None
        ]

    @staticmethod
    def _factor(
        letters: dict[str, Term], names: tuple[str, ...], term: Term, ax: Inference
    ) -> None:
        """Split an axis of two factors, of which one is known."""
        outer, inner = names
        if outer in letters:
            extent = divide(term.extent, letters[outer].extent)
        else:
            extent = letters[inner].extent
        if extent is None:
            raise Mismatch(f"{term.extent} has no factor {letters[outer].extent}")
        for name, part in zip(names, ax.split(term, extent), strict=True):
            ax.unify(letters.setdefault(name, part), part)

    def _positions(self, ax: Inference, value: object) -> tuple[Term, ...] | None:
        if not isinstance(value, torch.Tensor):
            return None
        fresh = tuple(ax.fresh(d) for d in value.shape)
        ax.pin_all(fresh, self.reason)
        return fresh

    def _pinned(self, layout: Layout) -> list[str]:
        """Letters that are marked, and those that only the result has."""
        marked = {m.rstrip("!") for m in re.findall(r"\*?\w+!", self.text)}
        operands = {name for _, axes in layout.addends for own in axes for name in own}
        return [
            name
            for name in layout.letters
            if name not in operands or _family(name) in marked or name in marked
        ]

    def _layout(self, node: fx.Node, ax: Inference) -> Layout:
        """Read the text against the ranks of the operands; they are noted as addends."""
        left, right = self.text.split("->")
        ranks: dict[str, int] = {}
        layout = Layout()
        for name, body in _GROUP.findall(left):
            operand = argument(node, name)
            if isinstance(operand, fx.Node):
                axes = _axes(body, len(ax.terms(operand)), ranks)
                layout.addends.append((operand, axes))
        values = node.meta["val"]
        first = values if isinstance(values, torch.Tensor) else values[0]
        (_, body), *_ = _GROUP.findall(right)
        layout.output = _axes(body, first.dim(), ranks)
        return layout


def _family(letter: str) -> str:
    """The starred name that a numbered letter belongs to."""
    return "*" + letter.rpartition(".")[0]


def _axes(body: str, rank: int, ranks: dict[str, int]) -> Axes:
    """Letters per axis; one starred name of unknown number takes the axes that are left.

    A starred name of which another operand has more axes is aligned at the right, as broadcasting
    does.
    """
    names = [part.strip().replace("!", "") for part in body.split(",") if part.strip()]
    stars = [n for n in names if n.startswith("*")]
    left = rank - (len(names) - len(stars))
    open_stars = [n for n in stars if n not in ranks]
    counts = {n: ranks[n] for n in stars if n in ranks}
    if len(stars) == 1:
        counts = {stars[0]: left}
        ranks[stars[0]] = max(left, ranks.get(stars[0], 0))
    elif len(open_stars) == 1:
        counts[open_stars[0]] = left - sum(counts.values())
        ranks[open_stars[0]] = counts[open_stars[0]]
    if sum(counts.values()) != left or any(c < 0 for c in counts.values()):
        raise Mismatch(f"an axis too many or too few for [{body}]: {rank}")
    axes: list[tuple[str, ...]] = []
    for name in names:
        if name.startswith("*"):
            # Numbered from the right, because broadcasting aligns at the right.
            count = counts[name]
            axes.extend((f"{name[1:]}.{count - 1 - i}",) for i in range(count))
        else:
            axes.append(tuple(name.split()))
    return tuple(axes)
