"""The Hessian of the loss with respect to the outputs: what the Gauss-Newton matrix has inside.

``GGN = J' H J`` with J the Jacobian of the outputs and H this Hessian, of which only products are
used: it may couple outputs in any way. With u of covariance H, ``J' u`` has the covariance GGN.

Source: Schraudolph 2002 (products); drawing from the Gauss-Newton matrix through a square root of H
is Martens' arXiv 1412.1193, section 6, where H is known in closed form; by Lanczos it is own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from torchlathe.passes.analysis.curvature.objective import Batch, Objective

__all__ = ["OutputHessian"]

_STEPS = 24


class OutputHessian:
    """Products with the Hessian of a batch's loss with respect to its outputs.

    Args:
        objective: Whose loss.
        outputs: Flat outputs of a run with gradients.
        batch: That they are of.

    Attributes:
        places: Which of the outputs the loss depends on.
        shapes: Of these.
    """

    def __init__(self, objective: Objective, outputs: list[Any], batch: Batch) -> None:
        places = objective.heads(outputs)
        points: list[torch.Tensor] = [outputs[i] for i in places]
        if objective.ctx.loss is not None:
            # Cut off from the network: an output may be computed from another one.
            points = [point.detach().requires_grad_(True) for point in points]
            outputs = list(outputs)
            for place, point in zip(places, points, strict=True):
                outputs[place] = point
        loss = objective.loss_from(outputs, batch)
        first = torch.autograd.grad(
            loss, points, create_graph=True, retain_graph=True, allow_unused=True
        )
        found = [each for each in zip(places, points, first, strict=True) if each[2] is not None]
        self.places = [place for place, _, _ in found]
        self._points = [point for _, point, _ in found]
        self._first = [gradient for _, _, gradient in found]
        self.shapes = [point.shape for point in self._points]

    @property
    def gradient(self) -> list[torch.Tensor]:
        """Of the loss, per head."""
        return [g.detach() for g in self._first]

    def __call__(self, vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """``H v``, one tensor per head."""
        pairs = [(g, v) for g, v in zip(self._first, vectors, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear in the outputs
            return [torch.zeros_like(v) for v in vectors]
        found = torch.autograd.grad(
            [g for g, _ in pairs],
            self._points,
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(v) if h is None else h.detach()
            for h, v in zip(found, vectors, strict=True)
        ]

    def root(
        self, vectors: Sequence[torch.Tensor], steps: int = _STEPS, room: int | None = None
    ) -> list[torch.Tensor]:
        """``H^(1/2) v`` by Lanczos; what is negative in H counts as zero.

        Exact where H has no more than ``steps`` distinct eigenvalues on the vector, as the scaled
        identity of squared errors does.

        Args:
            vectors: One tensor per head.
            steps: Products with H.
            room: Bytes that the vectors of all steps may take together. Where that is too little,
                each is made twice and none is kept.
        """
        flat = torch.cat([v.flatten() for v in vectors])
        norm = flat.norm()
        if not norm:
            return list(vectors)
        size = min(steps, flat.numel())
        if room is not None and size * flat.numel() * flat.element_size() > room:
            return self._cut(norm * self._root_in_passes(flat / norm, size))
        basis, diagonal, beside = self._lanczos(flat / norm, size)
        stacked = torch.stack(basis)
        return self._cut(norm * (_root_weights(diagonal, beside).to(stacked) @ stacked))

    def _lanczos(
        self, start: torch.Tensor, steps: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """An orthonormal basis, and the tridiagonal matrix in it."""
        basis = [start]
        diagonal: list[torch.Tensor] = []
        beside: list[torch.Tensor] = []
        scale = start.new_zeros(())
        for _ in range(steps):
            product = self._flat(basis[-1])
            diagonal.append(torch.dot(product, basis[-1]))
            scale = torch.maximum(scale, product.norm())
            for _ in range(2):  # twice is enough to stay orthogonal
                for other in basis:
                    product = product - torch.dot(product, other) * other
            rest = product.norm()
            if rest <= 32 * torch.finfo(rest.dtype).eps * scale:
                break
            beside.append(rest)
            basis.append(product / rest)
        return basis[: len(diagonal)], diagonal, beside

    def _root_in_passes(self, start: torch.Tensor, steps: int) -> torch.Tensor:
        """The same with three vectors: once for the matrix, and again for the sum.

        Not made orthogonal to all before, later vectors repeat directions that have converged,
        which takes steps and no accuracy (Druskin and Knizhnerman 1991).
        """
        diagonal: list[torch.Tensor] = []
        beside: list[torch.Tensor] = []
        total = torch.zeros_like(start)
        weights: torch.Tensor | None = None
        for _ in range(2):
            before, vector = torch.zeros_like(start), start
            scale = start.new_zeros(())
            for step in range(steps if weights is None else len(weights)):
                if weights is not None:
                    total = total + weights[step] * vector
                product = self._flat(vector)
                scale = torch.maximum(scale, product.norm())
                along = torch.dot(product, vector)
                product = product - along * vector
                if step:
                    product = product - beside[step - 1] * before
                rest = product.norm()
                if weights is None:
                    diagonal.append(along)
                    beside.append(rest)
                if rest <= 32 * torch.finfo(rest.dtype).eps * scale:
                    break
                before, vector = vector, product / rest
            if weights is None:
                weights = _root_weights(diagonal, beside).to(start)
        return total

    def _flat(self, vector: torch.Tensor) -> torch.Tensor:
        """``H v`` of all heads as one vector."""
        return torch.cat([h.flatten() for h in self(self._cut(vector))])

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def _root_weights(diagonal: Sequence[torch.Tensor], beside: Sequence[torch.Tensor]) -> torch.Tensor:
    """The first column of the root of a tridiagonal matrix; float64."""
    small = torch.diag(torch.stack(list(diagonal)))
    size = len(small)
    if size > 1:
        off = torch.diag(torch.stack(list(beside[: size - 1])), 1)
        small = small + off + off.T
    values, turned = torch.linalg.eigh(small.double())
    weights: torch.Tensor = turned @ (values.clamp_min(0).sqrt() * turned[0])
    return weights
