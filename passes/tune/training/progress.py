"""How far a training is, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Progress", "TrainingResult"]


@dataclass
class TrainingResult:
    """What a training came to.

    Attributes:
        tensors: What training changed: trained parameters and running statistics, by name. They
            are the best of all evaluations, or the last if the options say so.
        losses: The loss of each step.
        evaluations: ``step``, ``loss`` and further metrics, in order; the first is at the start.
        best: The one with the least loss; None without evaluations.
        steps: How many were done.
        stopped: Why before the end: ``"early"``, ``"diverged"``, or "" for neither.
        seconds: That this took, in this process, without what an interrupted run had done.
        resumed_at: The step that it went on from; 0 for a run from the start.
        records: What hooks had to say, per step.
    """

    tensors: dict[str, torch.Tensor]
    losses: list[float]
    evaluations: list[dict[str, float]]
    best: dict[str, float] | None
    steps: int
    stopped: str
    seconds: float
    resumed_at: int
    records: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, for the report; curves of many steps are thinned out."""
        stride = max(1, len(self.losses) // 500)
        return {
            "losses": [[i + 1, self.losses[i]] for i in range(0, len(self.losses), stride)],
            "evaluations": self.evaluations,
            "best": self.best,
            "steps": self.steps,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "records": self.records[::stride],
        }


@dataclass
class Progress:
    """Everything that a checkpoint holds, but parameters and optimizer."""

    step: int = 0
    epoch: int = 0
    position: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    stale: int = 0
    stopped: str = ""
    done: bool = False
