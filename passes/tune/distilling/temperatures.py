"""Temperatures that change while training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from torchlathe.ir import OptionError
from torchlathe.passes.tune.training.hooks import Hook

if TYPE_CHECKING:
    from torchlathe.passes.tune.training.trainer import Trainer

__all__ = ["Temperature", "TemperatureSchedule"]

TemperatureSchedule = Literal["constant", "cosine", "loss"]


class Temperature(Hook):
    """``T = T_min + (T_max - T_min) s``, with s from 1 to 0.

    ``"cosine"``: s falls along a cosine over the steps. ``"loss"``: s is where the last loss is
    between the least and the largest so far, so that the temperature is high while there is much
    to learn; a step's is the mean over the samples of all processes. ``"constant"``: s is 1.

    Source: HPM-KD's temperature schedules (arXiv 2512.09886). Its third is left out: it is
    ``s = exp(-lambda |dL/dt|)``, low where the loss is steep, and described as the opposite. The
    paper does not multiply the divergence by T^2, as `KnowledgeDistillation` does.

    Args:
        most: T_max.
        least: T_min.
        schedule: One of these.
        steps: Of the whole training.

    Raises:
        OptionError: A temperature that is not positive, or a least one above the largest.
    """

    def __init__(
        self,
        most: float,
        least: float = 1.0,
        schedule: TemperatureSchedule = "constant",
        steps: int = 1,
    ) -> None:
        if not most > 0 or not least > 0:
            raise OptionError(f"temperatures must be positive, got {most} and {least}")
        if schedule != "constant" and least > most:
            raise OptionError(f"the least temperature, {least}, is above the largest, {most}")
        self.most, self.least, self.schedule, self.steps = most, least, schedule, steps
        self.range: tuple[float, float] | None = None
        self.last = 0.0
        self._heard: list[torch.Tensor] = []

    def at(self, step: int) -> float:
        """The temperature of a step, counted from 0."""
        return self.least + (self.most - self.least) * self._share(step)

    def _share(self, step: int) -> float:
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.steps - 1))))
        if self.schedule == "loss" and self.range is not None and self.range[0] < self.range[1]:
            return (self.last - self.range[0]) / (self.range[1] - self.range[0])
        return 1.0

    def hear(self, loss: torch.Tensor, samples: int) -> None:
        """What a batch of a step came to, in this process."""
        if self.schedule == "loss":
            told = loss.detach().double().reshape(())
            self._heard.append(torch.stack([told * samples, torch.full_like(told, samples)]))

    def before_step(self, trainer: Trainer) -> None:
        """Tell the mean over the samples of the step."""
        if self._heard:
            total, count = trainer.processes.sum(torch.stack(self._heard).sum(0)).tolist()
            self._heard.clear()
            self.tell(total / count)

    def tell(self, loss: float) -> None:
        """What a step came to."""
        if math.isfinite(loss):
            low, high = self.range or (loss, loss)
            self.range, self.last = (min(low, loss), max(high, loss)), loss

    def state(self) -> dict[str, Any]:
        """What it knows of losses."""
        return {"range": self.range, "last": self.last}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take that back."""
        self.range, self.last = state["range"], state["last"]
