"""The criterion that asks `HessianSensitivity` what each unit costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from torchlathe.passes.analysis.families import Family
from torchlathe.passes.importance.criterion import Criterion, Scoring

__all__ = ["SensitivityCost"]


@dataclass(frozen=True)
class SensitivityCost(Criterion):
    """Predicted change of the loss when a unit goes: ``-g'w + w'Mw / 2`` over what writes it.

    M is the Gauss-Newton matrix with the covariance of all tensors of the unit in it, from vectors
    that are drawn from it; or what else `HessianSensitivity` has.

    Attributes:
        method: As of `HessianSensitivity`, whose result all passes of a pipeline share.

    Source: optimal brain damage (LeCun et al. 1990) with whole blocks in the place of its
    diagonal, estimated as in `torchlathe.passes.analysis.curvature.drawn`; own.
    """

    name: ClassVar[str] = "sensitivity"
    comparable: ClassVar[bool] = True

    method: Literal["auto", "kfac", "diagonal", "drawn"] = "auto"

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """Of all families, with one run over the data besides that of the analysis."""
        from torchlathe.passes.analysis.curvature import HessianSensitivity

        found = scoring.ctx.analysis(HessianSensitivity(samples=0))
        costs = found.costs_of([family.name for family in scoring.chosen], method=self.method)
        named = {family.name: cost for family, cost in costs.items()}
        return {family: named[family.name] for family in scoring.chosen}
