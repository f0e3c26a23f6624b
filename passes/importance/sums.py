"""Sums over everything but one axis of a tensor, each taken once for all families on the axis."""

from __future__ import annotations

import torch

from torchlathe.passes.analysis.families import Family
from torchlathe.passes.importance.criterion import Scoring

__all__ = ["PowerSums"]


class PowerSums:
    """Sums of absolute values or of squares; each (tensor, axis) is reduced once."""

    def __init__(self, scoring: Scoring, order: int) -> None:
        self.scoring = scoring
        self.order = order
        self._sums: dict[tuple[str, int], torch.Tensor] = {}
        self._matrices: dict[str, torch.Tensor] = {}

    def total(self, family: Family) -> torch.Tensor:
        """Sum over what each unit owns, shape (extent,)."""
        total = torch.zeros(family.extent, dtype=torch.float64)
        for part in self.scoring.owned(family):
            total += self.scoring.per_unit(family, part, self.along(part.name, part.axis))
        return total

    def mean(self, family: Family) -> torch.Tensor:
        """Mean over what each unit owns, shape (extent,)."""
        # A unit takes as many indices of an axis as any other, so all own the same number.
        count = sum(
            part.repeat * tensor.numel() // tensor.shape[part.axis]
            for part in self.scoring.owned(family)
            if (tensor := self.scoring.tensor(part.name)).numel()
        )
        return self.total(family) / max(1, count)

    def along(self, name: str, axis: int) -> torch.Tensor:
        """Per index of an axis, the sum over all others; shape (axis,) float64."""
        key = (name, axis)
        if key not in self._sums:
            tensor = self._tensor(name, kernels=axis > 1)
            others = [d for d in range(tensor.dim()) if d != axis]
            order = self.order
            norm = torch.linalg.vector_norm(tensor, order, dim=others) if others else tensor.abs()
            norm = norm.to("cpu", torch.float64)
            self._sums[key] = norm.square() if order == 2 else norm
        return self._sums[key]

    def _tensor(self, name: str, *, kernels: bool) -> torch.Tensor:
        """A tensor, or a matrix with the norms of its kernels.

        Both channel axes of a convolution are reduced from the matrix, so that the tensor, which
        is many times larger, is read once. A vector norm needs no temporary of its size.
        """
        tensor = self.scoring.tensor(name)
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if kernels or tensor.dim() < 3:
            return tensor
        if name not in self._matrices:
            dims = list(range(2, tensor.dim()))
            self._matrices[name] = torch.linalg.vector_norm(tensor, self.order, dim=dims)
        return self._matrices[name]
