"""How to train: what every pass that trains lets its user choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from torchlathe.ir import OptionError
from torchlathe.passes.options import did_you_mean

__all__ = ["Schedule", "TrainingOptions", "optimizer_class"]

Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a `Trainer`.

    Attributes:
        steps: Steps of the optimizer; None for as many as ``epochs`` have.
        epochs: Passes over the data, if ``steps`` is None.
        lr: Learning rate at its highest.
        optimizer: Name of a class in ``torch.optim``.
        optimizer_options: Further arguments of that class.
        schedule: How the learning rate falls after the warm-up: to zero along a cosine or a line,
            or not at all.
        warmup: Steps over which the learning rate rises from zero; at most a quarter of all.
        accumulate: Batches whose gradients make one step.
        clip: Largest norm of all gradients together; None for any.
        amp: Compute in bfloat16 where torch's autocast thinks that safe; parameters and the state
            of the optimizer keep their dtype.
        batch_norm: Normalise by the statistics of the batch, and follow them in the running ones.
        dropout: Draw dropout where the graph has it.
        trainable: Patterns of parameters to train; none for those that ask for gradients.
        frozen: Patterns of parameters that are not trained, whatever ``trainable`` says.
        shuffle: Another order of the batches in each epoch.
        held_out: Share of the batches that is kept for evaluation.
        evaluate_every: Steps between two evaluations; 0 for about ten in all.
        patience: Stop after so many evaluations without a better one; 0 for never.
        keep_best: End with the state that was best in an evaluation, the one at the start counting
            too, instead of the last.
        checkpoint: Folder for checkpoints; a run that finds its own there goes on from it.
        save_every: Steps between two checkpoints.
        recompute: Compute activations again in the backward pass, block by block, instead of
            keeping them.
    """

    steps: int | None = None
    epochs: int = 1
    lr: float = 1e-4
    optimizer: str = "AdamW"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = "cosine"
    warmup: int = 0
    accumulate: int = 1
    clip: float | None = 1.0
    amp: bool = False
    batch_norm: bool = True
    dropout: bool = True
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    shuffle: bool = True
    held_out: float = 0.1
    evaluate_every: int = 0
    patience: int = 0
    keep_best: bool = True
    checkpoint: str | None = None
    save_every: int = 50
    recompute: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense before any work starts.

        Raises:
            OptionError: A value out of its range, or an optimizer that torch does not have.
        """
        for name, least in (("steps", 1), ("epochs", 1), ("accumulate", 1), ("save_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name} is {value}, but must be at least {least}")
        for name in ("warmup", "evaluate_every", "patience"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not self.lr > 0:
            raise OptionError(f"lr is {self.lr}, but must be positive")
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"clip is {self.clip}, but must be positive", hint="none for none")
        if not 0 <= self.held_out < 1:
            raise OptionError(f"held_out is {self.held_out}, but must be in [0, 1)")
        self.make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer for parameters, or for groups of them.

        Raises:
            OptionError: torch has no such optimizer, or it does not take these options.
        """
        try:
            return optimizer_class(self.optimizer)(
                parameters, **{"lr": self.lr, **self.optimizer_options}
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"torch.optim.{self.optimizer} does not take optimizer_options "
                f"{dict(self.optimizer_options)}: {error}"
            ) from error

    def factor(self, step: int, total: int) -> float:
        """The learning rate of a step, as a share of the highest.

        Args:
            step: Counted from 0.
            total: Steps of the whole run.
        """
        warmup = min(self.warmup, total // 4)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of ``torch.optim``.

    Raises:
        OptionError: There is none of this name, or it cannot be stepped without a closure.
    """
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    if name not in known:
        raise OptionError(f"torch.optim has no {name}", hint=did_you_mean(name, known))
    if name in ("LBFGS", "SparseAdam"):
        raise OptionError(
            f"{name} cannot be used here: it needs "
            + ("a closure" if name == "LBFGS" else "sparse gradients")
        )
    return known[name]
