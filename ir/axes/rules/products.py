"""Further products: tensordot, Kronecker products, grouped matrix products, deformable kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.rule import Layout, Terms, argument
from torchlathe.ir.axes.rules.contraction import Axes, Contraction, Convolution

if TYPE_CHECKING:
    from torchlathe.ir.axes.inference import Inference

__all__ = ["DeformableConvolution", "GroupedMatMul", "Inner", "Kronecker", "TensorDot"]


class TensorDot(Contraction):
    """``tensordot``: pairs of axes are summed over, the others stand side by side."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """A letter for each pair, and one for each other axis."""
        layout = Layout()
        output: list[tuple[str, ...]] = []
        for name, dims in (("self", "dims_self"), ("other", "dims_other")):
            operand = argument(node, name)
            rank = len(ax.terms(operand))
            pairs = [d % rank for d in argument(node, dims)]
            axes = [
                (f"k{pairs.index(axis)}" if axis in pairs else f"{name}{axis}",)
                for axis in range(rank)
            ]
            output += [own for axis, own in enumerate(axes) if axis not in pairs]
            layout.factors.append((operand, tuple(axes)))
        layout.output = tuple(output)
        return layout


class Inner(Contraction):
    """``inner``: the sum of products over the last axes."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """``[*n, k] * [*m, k] -> [*n, *m]``."""
        layout = Layout()
        output: list[tuple[str, ...]] = []
        for name in ("self", "other"):
            operand = argument(node, name)
            rank = len(ax.terms(operand))
            lead = [(f"{name}{axis}",) for axis in range(rank - 1)]
            output += lead
            layout.factors.append((operand, (*lead, ("k",)) if rank else ()))
        layout.output = tuple(output)
        return layout


class Kronecker(Contraction):
    """``kron``: every axis of the result is ``axis of the first x axis of the second``."""

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """Two letters for each axis, aligned at the right."""
        rank = node.meta["val"].dim()
        layout = Layout()
        for name in ("self", "other"):
            operand = argument(node, name)
            own = len(ax.terms(operand))
            axes = tuple((f"{name}{axis}",) for axis in range(rank - own, rank))
            layout.factors.append((operand, axes))
        held = {letter for _, axes in layout.factors for axis in axes for letter in axis}
        layout.output = tuple(
            tuple(letter for letter in (f"self{a}", f"other{a}") if letter in held)
            for a in range(rank)
        )
        return layout


_GROUPED: dict[tuple[int, int], tuple[Axes, Axes, Axes, tuple[str, ...]]] = {
    # Ranks of both factors: their letters, those of the result, and which ones offsets cut.
    (2, 3): ((("t",), ("k",)), (("e",), ("k",), ("n",)), (("t",), ("n",)), ("t", "e")),
    (3, 2): ((("e",), ("m",), ("k",)), (("k",), ("t",)), (("m",), ("t",)), ("t", "e")),
    (2, 2): ((("m",), ("t",)), (("t",), ("n",)), (("e",), ("m",), ("n",)), ("t", "e")),
    (3, 3): ((("e",), ("m",), ("k",)), (("e",), ("k",), ("n",)), (("e",), ("m",), ("n",)), ()),
}


@dataclass(frozen=True)
class GroupedMatMul(Contraction):
    """One matrix product for each group of rows, as in a mixture of experts.

    The rows are sorted by group, and offsets say where each group ends; both rows and groups have
    to stay, the other axes are those of a matrix product.

    Attributes:
        left: Name of the rows' argument.
        right: Name of the matrices' argument.
    """

    left: str = "self"
    right: str = "mat2"

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """By the ranks of the factors."""
        left, right = argument(node, self.left), argument(node, self.right)
        first, second, output, _ = _GROUPED[len(ax.terms(left)), len(ax.terms(right))]
        layout = Layout(factors=[(left, first), (right, second)], output=output)
        bias = argument(node, "bias")
        if isinstance(bias, fx.Node):
            layout.addends = [(bias, (("e",), ("n",))[-len(ax.terms(bias)) :])]
        return layout

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Groups and the rows that offsets cut are fixed."""
        terms = super().infer(node, ax)
        layout = ax.layouts[node]
        ranks = tuple(len(axes) for _, axes in layout.factors)
        for name in _GROUPED[ranks][3]:  # type: ignore[index]
            ax.pin(layout.letters[name], "offsets say which rows belong to which matrix")
        offsets = argument(node, "offs")
        if isinstance(offsets, fx.Node):
            ax.pin_all(ax.terms(offsets), "it says where each group of rows ends")
        return terms


class DeformableConvolution(Convolution):
    """``torchvision::deform_conv2d``: a convolution that reads at places which tensors give."""

    def bias(self, node: fx.Node) -> str | None:
        """Places outside of the image hold zeros, so that a constant does not stay one."""
        return None

    def layout(self, node: fx.Node, ax: Inference) -> Layout:
        """That of a convolution; what gives the places is fixed."""
        for name in ("offset", "mask"):
            ax.pin_all(ax.terms(argument(node, name)), "it says where a kernel reads")
        groups: Any = argument(node, "offset_groups", 1)
        if groups != 1:
            x = ax.terms(argument(node, "input"))
            ax.pin(x[1], "groups of it are read at places of their own")
        return super().layout(node, ax)
