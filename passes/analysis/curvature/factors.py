"""One layer's curvature as a Kronecker product, and costs of changing its weight.

With the rows x of the layer's input (and a one for its bias) and the gradients u at its result,
the block of the Gauss-Newton matrix is taken to be ``G (x) A`` with ``A = E[x x']`` and
``G = sum of u u'``.

Source: K-FAC (arXiv 1503.05671, equation 1 and section 3); convolutions as in KFC (arXiv
1602.01407), and positions that share a weight as in "expand" of arXiv 2311.00636.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.statistics.layers import LayerMoments
from torchlathe.passes.statistics.moments import Moments

__all__ = ["LayerCurvature", "bias_of"]


@dataclass(frozen=True, eq=False)
class LayerCurvature:
    """The curvature of one layer's weight (and bias): ``G (x) A``.

    Attributes:
        moments: Where it comes from: ``weight_matrix`` and ``weight_from`` lead from the weight to
            the matrix (groups, outs, features) that the factors are for, and back.
        scale: What the block is multiplied with.
        bias: Name of the bias, if a parameter is added to the result.
    """

    moments: LayerMoments
    scale: float = 1.0
    bias: str | None = None

    @classmethod
    def of(cls, moments: LayerMoments, scale: float = 1.0) -> LayerCurvature:
        """From moments with gradients, as `statistics.collect_layers` gives them.

        Args:
            moments: With gradients.
            scale: Multiplies the block.

        Raises:
            ValueError: They have no gradients.
        """
        if moments.outputs is None:
            raise ValueError("the moments of gradients were not collected")
        return cls(moments, scale, bias_of(moments.reader.node))

    @property
    def inputs(self) -> torch.Tensor:
        """A, shape (groups, features, features); made from its sum each time."""
        return self.moments.inputs.second

    @property
    def outputs(self) -> torch.Tensor:
        """G, shape (groups, outs, outs), with the scale of the loss in it; made each time."""
        return self._outputs.second.mul_(self.scale)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the rows, shape (groups, features): what bias and weight have in common."""
        return self.moments.inputs.mean

    @property
    def _outputs(self) -> Moments:
        assert self.moments.outputs is not None  # `of` sees to it
        return self.moments.outputs

    @property
    def node(self) -> fx.Node:
        """The call."""
        return self.moments.reader.node

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return self.moments.reader.weight

    @property
    def trace(self) -> float:
        """Of the weight's block, ``sum over groups of tr G tr A``."""
        a, g = self._diagonals()
        return float((a.sum(1) * g.sum(1)).sum())

    @property
    def top(self) -> float:
        """Largest eigenvalue of the weight's block, ``max over groups of |G| |A|``."""
        sizes = [torch.linalg.matrix_norm(m, 2) for m in (self.inputs, self.outputs)]
        return float((sizes[0] * sizes[1]).max())

    def diagonal(self, shape: torch.Size) -> torch.Tensor:
        """Of the weight's block, in the weight's shape."""
        a, g = self._diagonals()
        return self.moments.weight_from(g[:, :, None] * a[:, None, :], shape)

    def _diagonals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of A and G, float64."""
        inputs, outputs = self.moments.inputs, self._outputs
        return inputs.squares / inputs.count, outputs.squares * (self.scale / outputs.count)

    def quadratic(self, dW: torch.Tensor, db: torch.Tensor | None = None) -> float:
        """``tr(G dW A dW')``, twice the predicted change of the loss.

        Args:
            dW: Change of the weight, in its shape.
            db: Change of the bias; together they are taken as one more feature that is always one.
        """
        A = self.inputs
        matrix = self._matrix(dW, A)
        read = matrix @ A
        if db is None:
            return self._traced(read, matrix)
        shift = self._shift(db, matrix)
        mean = self.mean.to(A)
        read = read + shift[:, :, None] * mean[:, None, :]
        offset = (matrix @ mean[:, :, None])[:, :, 0] + shift
        return self._traced(read, matrix) + self._traced(offset[:, :, None], shift[:, :, None])

    def row_products(self, W: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        """What pairs of rows cost together when both go: ``G * (W A W')``.

        Shape (groups, outs, outs); the sum over the rows and columns of a set of rows is twice the
        predicted change of the loss if the set is zeroed (with their biases, where b is given).
        """
        A = self.inputs
        matrix = self._matrix(W, A)
        inner = matrix @ A @ matrix.mT
        if b is not None:
            shift = self._shift(b, matrix)
            crossed = (matrix @ self.mean.to(A)[:, :, None]) @ shift[:, None, :]
            inner = inner + crossed + crossed.mT + shift[:, :, None] * shift[:, None, :]
        return self.outputs.to(inner) * inner

    def column_products(self, W: torch.Tensor) -> torch.Tensor:
        """What pairs of features cost together when both go: ``A * (W' G W)``.

        Shape (groups, features, features), to be summed as `row_products`.
        """
        A = self.inputs
        matrix = self._matrix(W, A)
        return A * (matrix.mT @ self.outputs.to(matrix) @ matrix)

    def _matrix(self, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self.moments.weight_matrix(weight.detach()).to(like)

    def _shift(self, bias: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return bias.detach().to(matrix).reshape(matrix.shape[:2])

    def _traced(self, left: torch.Tensor, right: torch.Tensor) -> float:
        product = self.outputs.to(left) @ left
        return float((product.double() * right.double()).sum())


def bias_of(node: fx.Node) -> str | None:
    """Name of the parameter that a linear op or a convolution adds to its result."""
    bias: Any = argument(node, "bias")
    return info(bias).tensor if isinstance(bias, fx.Node) else None
