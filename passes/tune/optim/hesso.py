"""HESSO: the groups that matter least go to zero in equal steps, and training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.families import Families
from torchlathe.passes.tune.optim.sparse_optimizer import (
    GONE,
    KEPT,
    LEAVING,
    Memory,
    SparseOptimizer,
)

__all__ = ["HESSO", "left_after"]


def left_after(step: int, steps: int) -> float:
    """The factor of one step, such that ``steps`` of them take x to zero along a line.

    Their product up to a step telescopes to ``1 - (step + 1) / steps``.

    Args:
        step: Counted from 0.
        steps: Of the whole decay.
    """
    return (steps - step - 1) / (steps - step)


class HESSO(SparseOptimizer):
    """Hybrid efficient structured sparse optimizer.

    After ``start_step`` steps of the base, ``periods`` periods follow. In the first step of each,
    the groups of the lowest saliency that are not zero yet are chosen, as many as bring the zeros
    to their share of the target; the period takes them to exactly zero: after each step of the
    base they are multiplied by (T - t - 1) / (T - t), T the steps of a period and t from 0.
    Groups that are zero stay so, whatever momentum and weight decay do; all else trains as ever.

    Saliency is computed once a period, from the weights before a step and what the base did to
    them, so a step costs one multiplication per tensor. A copy of the prunable tensors is held
    until the last period ends.

    Args:
        groups: See `SparseOptimizer`, as for all that is not here.
        model: The module.
        pruning_steps: Steps over which groups become zero.
        periods: In how many parts; ``pruning_steps`` is at least that.
        options: Of `SparseOptimizer`, and of the base (``lr``).

    Source: HESSO, arXiv 2409.09085, and its official code. There the first factor of a period is
    skipped; here the decay is the whole line.
    """

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        pruning_steps: int = 1,
        periods: int = 1,
        **options: Any,
    ) -> None:
        if not 1 <= periods <= pruning_steps:
            raise OptionError(
                f"periods is {periods}, but must be from 1 to pruning_steps, {pruning_steps}",
                where=type(self).__name__,
            )
        super().__init__(groups, model, pruning_steps=pruning_steps, **options)
        self.periods = periods

    def schedule(self) -> dict[str, int]:
        """When groups go."""
        return super().schedule() | {"periods": self.periods}

    @property
    def period_steps(self) -> int:
        """Steps of one period."""
        return self.pruning_steps // self.periods

    def _place(self) -> tuple[int, int] | None:
        """The period and the step in it, or None outside of all."""
        period, step = divmod(self.steps - self.start_step, self.period_steps)
        return (period, step) if 0 <= period < self.periods else None

    def _before(self) -> Memory | None:
        place = self._place()
        return self._remember() if place is not None and place[1] == 0 else None

    def _after(self, before: Memory | None, loss: Any) -> None:
        place = self._place()
        if place is None:
            self._multiply()
            return
        period, step = place
        if before is not None:
            self._choose(before, period)
        self._multiply(left_after(step, self.period_steps))
        if step == self.period_steps - 1:
            self._set_phase(self.phase == LEAVING, GONE)

    def _choose(self, before: Memory, period: int) -> None:
        """Which groups this period takes to zero."""
        gone = self.phase != KEPT
        share = self.target // self.periods * (period + 1)
        wanted = self.target if period == self.periods - 1 else share
        scores = self.saliency.scores(self._sums(before))
        self._set_phase(self._lowest(scores, max(0, wanted - int(gone.sum())), gone), LEAVING)
