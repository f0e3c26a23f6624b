"""Sums over everything but one axis of a tensor, each taken once for all families on the axis."""

from __future__ import annotations

import torch

from torchlathe.passes.analysis.families import Family
from torchlathe.passes.importance.criterion import Scoring

__all__ = ["PowerSums"]

_CHUNK = 2**22  # elements that are raised to a power at a time, so that no copy of all is made


class PowerSums:
    """Sums of absolute values or of squares; each (tensor, axis) is reduced once."""

    def __init__(self, scoring: Scoring, order: int) -> None:
        self.scoring = scoring
        self.order = order
        self._sums: dict[tuple[str, int], torch.Tensor] = {}

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
        if (name, axis) not in self._sums:
            tensor = self.scoring.tensor(name)
            found = self._channels(tensor) if axis < 2 else [self._other(tensor, axis)]
            for i, total in enumerate(found):
                self._sums[name, i if axis < 2 else axis] = total.to("cpu", torch.float64)
        return self._sums[name, axis]

    def _channels(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Sums along the first axis, and the second if there is one, in one reading."""
        if tensor.dim() < 2:
            return [self._power(tensor)]
        rows, columns = [], torch.zeros((), dtype=torch.float64, device=tensor.device)
        for part in tensor.split(max(1, _CHUNK // max(1, tensor[0].numel()))):
            power = self._power(part)
            rows.append(power.flatten(1).sum(1))
            # Adding up rows goes through memory as it lies, and is several times faster than
            # reducing each small kernel first.
            columns = columns + power.sum(0).flatten(1 if tensor.dim() > 2 else 0).double()
        return [torch.cat(rows), columns.sum(1) if tensor.dim() > 2 else columns]

    def _other(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        others = [d for d in range(tensor.dim()) if d != axis]
        return self._power(tensor).sum(others)

    def _power(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        return tensor.square() if self.order == 2 else tensor.abs()
