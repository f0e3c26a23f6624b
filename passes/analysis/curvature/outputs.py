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

    def root(self, vectors: Sequence[torch.Tensor], steps: int = _STEPS) -> list[torch.Tensor]:
        """``H^(1/2) v`` by Lanczos; what is negative in H counts as zero.

        Exact where H has no more than ``steps`` distinct eigenvalues on the vector, as the scaled
        identity of squared errors does.

        Args:
            vectors: One tensor per head.
            steps: Products with H, and vectors kept; of all heads together.
        """
        flat = torch.cat([v.flatten() for v in vectors])
        norm = flat.norm()
        if not norm:
            return list(vectors)
        basis = [flat / norm]
        diagonal: list[torch.Tensor] = []
        beside: list[torch.Tensor] = []
        scale = torch.zeros_like(norm)
        for _ in range(min(steps, flat.numel())):
            product = torch.cat([h.flatten() for h in self(self._cut(basis[-1]))])
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
        size = len(diagonal)
        small = torch.diag(torch.stack(diagonal))
        if size > 1:
            off = torch.diag(torch.stack(beside[: size - 1]), 1)
            small = small + off + off.T
        values, turned = torch.linalg.eigh(small.double())
        weights = turned @ (values.clamp_min(0).sqrt() * turned[0])
        stacked = torch.stack(basis[:size])
        return self._cut(norm * (weights.to(stacked.dtype) @ stacked))

    def _cut(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([shape.numel() for shape in self.shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]
