"""Ops that sum products over letters: linear, matmul, einsum, convolutions, and signatures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import divide
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
    with_arguments,
)
from torchlathe.ir.axes.terms import ONE, Mismatch, Term
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["Contraction", "Convolution", "Einsum", "MatMul", "Signature"]

Axes = tuple[tuple[str, ...], ...]


class Contraction(Rule):
    """``out = sum over contracted letters of the product of the factors, plus the addends``."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """The letters of this node's operands and result."""
        raise NotImplementedError

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The same letter is the same term everywhere."""
        layout = self.layout(node, ax)
        ax.layouts[node] = layout
        letters = layout.letters
        for operand, axes in (*layout.factors, *layout.addends):
            for term, names in zip(ax.terms(operand), axes, strict=True):
                if is_one(term):
                    for name in names:
                        letters.setdefault(name, ONE)
                elif len(names) == 1 and is_one(letters.get(names[0], ONE)):
                    letters[names[0]] = term
                else:
                    ax.unify(term, ax.solver.product(letters[name] for name in names))
        out = []
        for names, extent in zip(layout.output, ax.shape(node), strict=True):
            if any(name not in letters for name in names):
                letters[names[0]] = ax.fresh(extent)
            out.append(ax.solver.product(letters[name] for name in names))
        return tuple(out)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A letter's indices vanish from the sum if any factor is zero there."""
        layout = flow.layout(node)
        mine = flow.letters(node)
        products = {name: self._product(layout.factors, name, flow) for name in mine}
        for name in mine & layout.contracted:
            if not products[name].is_zero:
                self._fold_or_lose(node, name, flow)
        out: list[Value | None] = []
        for names in layout.output:
            here = [products[name] for name in names if name in mine]
            if not here:
                out.append(None)
                continue
            value = ZERO if all(v.is_zero for v in here) else UNKNOWN
            for operand, axes in layout.addends:
                added = [
                    flow.value(operand, axis)
                    for axis, own in enumerate(axes)
                    if set(own) & set(names)
                ]
                if not added or not all(v is not None and v.is_zero for v in added):
                    value = UNKNOWN
            out.append(value)
        return tuple(out)

    @staticmethod
    def _product(factors: list[tuple[fx.Node, Axes]], name: str, flow: Flow) -> Value:
        found = [
            value
            for operand, axes in factors
            for axis, own in enumerate(axes)
            if name in own and (value := flow.value(operand, axis)) is not None
        ]
        if any(v.singular for v in found):
            return SINGULAR
        return ZERO if any(v.is_zero for v in found) else UNKNOWN

    def bias(self, node: fx.Node) -> str | None:
        """Name of the argument that a constant can be folded into; None where it cannot."""
        return None

    def _fold_or_lose(self, node: fx.Node, name: str, flow: Flow) -> None:
        """A known constant times a parameter is a constant, which the bias can take."""
        factors = flow.layout(node).factors
        constants = [
            value.constant
            for operand, axes in factors
            for axis, own in enumerate(axes)
            if own == (name,) and (value := flow.value(operand, axis)) is not None
        ]
        known = [c for c in constants if c is not None]
        plain = len(factors) == 2 and info(factors[1][0]).tensor is not None
        if len(known) == 1 and plain and self.bias(node) is not None:
            flow.fold(node, known[0])
        else:
            flow.lose(node, "it sums over indices that are not zero")

    def folded(
        self, node: fx.Node, layout: Layout, weight: torch.Tensor, constants: torch.Tensor
    ) -> torch.Tensor:
        """What constants at the contracted indices add to the result.

        Args:
            node: The contraction.
            layout: Its letters.
            weight: The parameter, before anything was left out.
            constants: Per index of its contracted axis, zero where the index stays; float64.

        Returns:
            Float64, one number per index of the weight's other channel axis.
        """
        _, axes = layout.factors[1]
        out = {letter for axis in layout.output for letter in axis}
        kept = next(i for i, own in enumerate(axes) if set(own) & out)
        read = self.read_axis(layout)
        other = [i for i in range(weight.dim()) if i not in (kept, read)]
        matrix = weight.detach().to("cpu", torch.float64)
        matrix = matrix.sum(other) if other else matrix
        return matrix @ constants if kept < read else constants @ matrix

    @staticmethod
    def read_axis(layout: Layout) -> int:
        """The weight's axis that is summed over against the channels of the data."""
        data = {letter for axis in layout.factors[0][1] for letter in axis}
        contracted = layout.contracted & data
        return next(i for i, own in enumerate(layout.factors[1][1]) if set(own) & contracted)

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """Axes of an operand whose letters are all summed over."""
        assert layout is not None
        contracted = layout.contracted
        found: set[int] = set()
        for used, axes in (*layout.factors, *layout.addends):
            if used is operand:
                found |= {i for i, own in enumerate(axes) if own and set(own) <= contracted}
        return found


_OPERAND = re.compile(r"\s*(\w+)\s*\[([^\]]*)\]\s*")


@dataclass(frozen=True)
class Signature(Contraction):
    """A contraction in writing: ``"x[*b, i] * weight[o, i] + bias[o] -> [*b, o]"``.

    Operands are named as in the op's schema. ``*`` (or a comma) multiplies, ``+`` adds. A letter
    that is missing in the result is summed over. ``*name`` stands for any number of leading axes
    that broadcast. Optional operands may be absent, and addends may lack leading axes.

    Attributes:
        text: The signature.
        bias_name: The operand that is added per index of the result's last axis, if there is one.
    """

    text: str
    bias_name: str | None = None

    def bias(self, node: fx.Node) -> str | None:
        """As the op's schema calls it; None where it is scaled (``addmm`` with a beta)."""
        scaled = any(argument(node, name, 1) != 1 for name in ("alpha", "beta"))
        return None if scaled else self.bias_name

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """Read the text against the ranks of the operands."""
        left, right = self.text.split("->")
        layout = Layout()
        ranks: dict[str, int] = {}
        for addend, name, body in _operands(left):
            operand = argument(node, name)
            if not isinstance(operand, fx.Node):
                continue
            rank = len(ax.terms(operand))
            if addend and "*" not in body:
                # What is added broadcasts to the result.
                body = ",".join(body.split(",")[-rank:]) if rank else ""
            axes = _axes(body, rank, ranks)
            (layout.addends if addend else layout.factors).append((operand, axes))
        body = right.strip().removeprefix("[").removesuffix("]")
        layout.output = _axes(body, node.meta["val"].dim(), ranks)
        return layout


def _operands(text: str) -> list[tuple[bool, str, str]]:
    found = []
    addend = False
    position = 0
    while position < len(text):
        match = _OPERAND.match(text, position)
        if match is None:
            raise ValueError(f"cannot read the signature {text!r} at {text[position:]!r}")
        found.append((addend, match[1], match[2]))
        position = match.end()
        if position < len(text):
            addend = text[position] == "+"
            position += 1
    return found


def _axes(body: str, rank: int, ranks: dict[str, int]) -> Axes:
    """Letters per axis; a starred name takes the axes that the plain letters leave."""
    names = [part.strip() for part in body.split(",") if part.strip()]
    axes: list[tuple[str, ...]] = []
    for name in names:
        if not name.startswith("*"):
            axes.append((name,))
            continue
        count = rank - (len(names) - 1)
        if count < 0:
            raise Mismatch(f"an operand of rank {rank} for [{body}]")
        # Numbered from the right, because broadcasting aligns at the right.
        axes.extend((f"{name[1:]}{count - 1 - i}",) for i in range(count))
        ranks[name] = count
    if len(axes) != rank:
        raise Mismatch(f"an operand of rank {rank} for [{body}]")
    return tuple(axes)


class MatMul(Contraction):
    """``matmul`` of any ranks; a vector has only the axis that is summed over."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """``[*b, n, k] * [*b, k, m] -> [*b, n, m]``, without n or m for a vector."""
        left, right = argument(node, "self"), argument(node, "other")
        ranks = len(ax.terms(left)), len(ax.terms(right))
        batch = tuple((f"b{i}",) for i in reversed(range(max(0, max(ranks) - 2))))
        n: Axes = (("n",),) if ranks[0] > 1 else ()
        m: Axes = (("m",),) if ranks[1] > 1 else ()
        layout = Layout(output=(*batch, *n, *m))
        for operand, own in ((left, (*n, ("k",))), (right, (("k",), *m))):
            count = len(ax.terms(operand)) - len(own)
            layout.factors.append((operand, (*batch[len(batch) - count :], *own)))
        return layout


class Einsum(Contraction):
    """``einsum`` without an ellipsis on unequal ranks; the equation is the layout."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """Letters of the equation."""
        equation = str(node.args[0]).replace(" ", "")
        operands = list(node.args[1])  # type: ignore[arg-type]
        left, _, right = equation.partition("->")
        inputs = left.split(",")
        if not right and "->" not in equation:
            plain = left.replace(",", "").replace("...", "")
            right = ("..." if "..." in left else "") + "".join(
                sorted(c for c in set(plain) if plain.count(c) == 1)
            )
        layout = Layout()
        for text, operand in zip(inputs, operands, strict=True):
            assert isinstance(operand, fx.Node)
            layout.factors.append((operand, _letters(text, len(ax.terms(operand)))))
        layout.output = _letters(right, node.meta["val"].dim())
        return layout


def _letters(text: str, rank: int) -> Axes:
    before, dots, after = text.partition("...")
    axes = [(c,) for c in before]
    if dots:
        count = rank - len(before) - len(after)
        axes += [(f"...{count - 1 - i}",) for i in range(count)]
    return tuple(axes + [(c,) for c in after])


@dataclass(frozen=True)
class Convolution(Contraction):
    """Convolutions of any rank, grouped and depthwise, and transposed ones.

    Attributes:
        transposed: Whether the weight is (in, out / groups, *kernel).
    """

    transposed: bool = False

    def bias(self, node: fx.Node) -> str | None:
        """At the border a zero-padded kernel sees fewer constants than inside."""
        padding: Any = argument(node, "padding", 0)
        padded = padding != "valid" if isinstance(padding, str) else _any(padding)
        grouped = argument(node, "groups", 1) != 1
        return None if padded or grouped or self._transposed(node) else "bias"

    def _transposed(self, node: fx.Node) -> bool:
        return self.transposed or bool(argument(node, "transposed", False))

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """``x[n, (g i), *s] * w[(g o), i, *k] + b[(g o)] -> [n, (g o), *t]``."""
        x, weight = argument(node, "input"), argument(node, "weight")
        bias, groups = argument(node, "bias"), argument(node, "groups", 1)
        assert isinstance(x, fx.Node)
        assert isinstance(weight, fx.Node)
        x_terms, w_terms = ax.terms(x), ax.terms(weight)
        spatial = len(w_terms) - 2
        lead = len(x_terms) - spatial - 1  # 1, or 0 without a batch
        out_channels = ax.shape(node)[lead]
        letters: dict[str, Term] = {}
        x_channel = x_terms[lead]
        if groups == 1:
            letters["g"] = ONE
        else:
            inner = divide(x_channel.extent, groups)
            letters["g"], letters["i"] = ax.split(x_channel, inner)
            o_inner = divide(out_channels, groups)
            first = w_terms[1 if self._transposed(node) else 0]
            if self._transposed(node):
                letters["o"] = first
            else:
                outer, letters["o"] = ax.split(first, o_inner)
                ax.unify(letters["g"], outer)
        ax.pin_all(x_terms[lead + 1 :], "it is a position that a convolution slides over")
        ax.pin_all(w_terms[2:], "it is a position in a convolution's kernel")
        # With one group the letter g would only be in the way.
        grouped = groups != 1
        channel_in: tuple[str, ...] = ("g", "i") if grouped else ("i",)
        channel_out: tuple[str, ...] = ("g", "o") if grouped else ("o",)
        kernel = tuple((f"k{i}",) for i in range(spatial))
        w_axes = (
            (channel_in, ("o",), *kernel)
            if self._transposed(node)
            else (channel_out, ("i",), *kernel)
        )
        batch = tuple((f"n{i}",) for i in range(lead))
        layout = Layout(letters=letters)
        layout.factors = [
            (x, (*batch, channel_in, *((f"s{i}",) for i in range(spatial)))),
            (weight, w_axes),
        ]
        if isinstance(bias, fx.Node):
            layout.addends = [(bias, (channel_out,))]
        layout.output = (*batch, channel_out, *((f"t{i}",) for i in range(spatial)))
        return layout

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Positions of the result are its own, and fixed."""
        terms = super().infer(node, ax)
        assert isinstance(terms, tuple)
        layout = ax.layouts[node]
        for term, names in zip(terms, layout.output, strict=True):
            if names[0].startswith("t"):
                ax.pin(term, "it is a position of a convolution's result")
        return terms

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The number of groups."""
        groups: Any = argument(node, "groups", 1)
        letters = resize.layout(node).letters
        if groups != 1 and resize.touched(letters["g"]):
            new = resize.extent(letters["g"])
            resize.edit.set_args(node, *with_arguments(node, {"groups": new}))


def _any(padding: Any) -> bool:
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)
