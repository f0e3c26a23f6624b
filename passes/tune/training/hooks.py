"""What other passes do between the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.passes.tune.training.module import like

if TYPE_CHECKING:
    from torchlathe.passes.tune.training.trainer import Trainer

__all__ = ["Hook", "KeepMasks"]


class Hook:
    """Called by a `Trainer`; each method does nothing unless a subclass says otherwise."""

    def begin(self, trainer: Trainer) -> None:
        """Before the first step, when parameters and optimizer are there."""

    def before_step(self, trainer: Trainer) -> None:
        """With all gradients there, before they are clipped and the optimizer steps."""

    def after_step(self, trainer: Trainer) -> None:
        """After the optimizer stepped; ``trainer.step`` still counts the steps before it."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: dicts, lists, numbers, texts and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""

    def describe(self) -> str:
        """What to show besides the loss while training; "" for nothing."""
        return ""

    def record(self) -> dict[str, float]:
        """Numbers to keep for each step, besides the loss."""
        return {}


class KeepMasks(Hook):
    """Keeps elements of parameters at zero.

    Their gradients are set to zero before the optimizer sees them, so that neither momentum nor
    the norm that gradients are clipped by knows of them, and the elements themselves after.

    Args:
        masks: Per parameter, bool in its shape: where it may be other than zero.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor]) -> None:
        self.masks = dict(masks)
        self._local: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, trainer: Trainer) -> None:
        """Set to zero what is to stay so."""
        trained = trainer.parameters
        for name, mask in self.masks.items():
            if name in trained:
                self._local[name] = _local(like(mask, trained[name]))
        self.after_step(trainer)

    @torch.no_grad()
    def before_step(self, trainer: Trainer) -> None:
        """Mask the gradients."""
        for name, mask in self._local.items():
            if (gradient := trainer.parameters[name].grad) is not None:
                _local(gradient).mul_(mask)

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Mask the parameters."""
        for name, mask in self._local.items():
            _local(trainer.parameters[name]).mul_(mask)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process has; shares its memory."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found
