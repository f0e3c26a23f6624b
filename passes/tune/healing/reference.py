"""The original beside the program that is tuned: its outputs, and values inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlathe.ir import Program
from torchlathe.passes.tune.training import Forward, TrainingModule

__all__ = ["Reference", "Told", "fidelity", "floating"]


@dataclass(frozen=True)
class Told:
    """What the original makes of a batch.

    Attributes:
        outputs: Flat outputs.
        taps: Values of nodes, by name.
    """

    outputs: Sequence[Any]
    taps: dict[str, torch.Tensor]


class Reference:
    """Runs the original, in eval mode and without gradients.

    Its tensors are those that the caller's model has; nothing is copied.

    Args:
        original: The program.
        taps: Names of its nodes whose values are wanted.
    """

    def __init__(self, original: Program, taps: Sequence[str] = ()) -> None:
        self._module = TrainingModule(original, (), taps=taps, batch_norm=False).eval()

    def __call__(self, forward: Forward) -> Told:
        """What it makes of a batch of a training."""
        with torch.no_grad():
            outputs, taps = self._module(*forward.flat)
        return Told(outputs, taps)


def floating(outputs: Sequence[Any], others: Sequence[Any]) -> list[int]:
    """Places of the outputs that can be compared: floating, with axes, and of equal shape."""
    return [
        place
        for place, (a, b) in enumerate(zip(outputs, others, strict=True))
        if isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.is_floating_point()
        and a.dim()
        and a.shape == b.shape
    ]


def fidelity(
    outputs: Sequence[Any], told: Sequence[Any], logits: Sequence[bool]
) -> dict[str, float]:
    """How near outputs are to those of the original.

    Returns:
        ``cosine``: the mean cosine of rows of the last axis; ``error``: the norm of the difference
        over that of the original; ``top1``: share of rows of logits with the largest value at the
        same index, if there are any.
    """
    cosines, errors, same = [], [], []
    for place in floating(outputs, told):
        a, b = outputs[place].detach().float(), told[place].float()
        rows = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        cosines.append(float(rows.mean()))
        errors.append(float((a - b).norm() / b.norm().clamp_min(1e-30)))
        if logits[place]:
            same.append(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    found = {"cosine": _mean(cosines), "error": _mean(errors)}
    return {**found, "top1": _mean(same)} if same else found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
