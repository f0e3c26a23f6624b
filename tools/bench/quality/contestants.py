"""torchlathe on the nets: every importance and allocation, with and without refitting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from torchlathe.ir import Program
from torchlathe.passes import PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.base import PassContext
from torchlathe.passes.importance import Criterion, Scoring, get_criterion, scores
from torchlathe.passes.rewrite.compensating.compensation import Compensation

__all__ = ["Task", "erase", "scored"]


@dataclass(frozen=True)
class _Known(Criterion):
    """Scores that were computed once, for all sizes and allocations."""

    name: ClassVar[str] = "known"

    by_name: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """By the name of the family."""
        return {family: self.by_name[family.name] for family in scoring.chosen}


@dataclass(frozen=True)
class _KnownComparable(_Known):
    name: ClassVar[str] = "known-comparable"
    comparable: ClassVar[bool] = True


@dataclass(frozen=True)
class Task:
    """A program, its data, and how good it is.

    Attributes:
        program: The original.
        batches: Calibration data.
        loss: For gradients; None where there is none.
        metric: From a program to what is measured of it, higher is better.
        options: Further options of `StructuredErase`.
    """

    program: Program
    batches: Iterable[Any]
    loss: Callable[[Any, Any], torch.Tensor] | None
    metric: Callable[[Program], float]
    options: Mapping[str, Any] = field(default_factory=dict)


def scored(task: Task, name: str) -> Criterion:
    """A criterion with its scores computed."""
    families = task.program.analysis(ZeroInvariantGroups)
    chosen = tuple(f for f in families.prunable if f.exactness != "approximate")
    ctx = PassContext(task.program, name, calibration=task.batches, loss=task.loss)
    found = scores(task.program, families, chosen, name, ctx)
    kind = _KnownComparable if get_criterion(name).comparable else _Known
    return kind({family.name: score for family, score in found.items()})


def erase(
    task: Task, criterion: Criterion, scope: str, sizes: Sequence[float]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Sizes reached and the metric there, as erased and refitted.

    Args:
        task: What to erase from.
        criterion: Importance, computed.
        scope: global, local or isomorphic; ``global/cost`` is global and cost-aware.
        sizes: Shares of the parameters to keep.
    """
    plain: list[dict[str, float]] = []
    refitted: list[dict[str, float]] = []
    whole = _count(task.program)
    for size in sizes:
        erasing = StructuredErase(
            params=size,
            importance=criterion,
            scope=scope.partition("/")[0],  # type: ignore[arg-type]
            cost_aware=scope.endswith("/cost"),
            **task.options,
        )
        after = PassManager([erasing], verify="off").run(task.program)
        left = _count(after) / whole
        plain.append({"size": size, "left": left, "metric": task.metric(after)})
        # As `compensate` does, without erasing again.
        ctx = PassContext(task.program, "refit", calibration=task.batches)
        Compensation(task.program, ctx, {}).apply(after)
        refitted.append({"size": size, "left": left, "metric": task.metric(after)})
    return plain, refitted


def _count(program: Program) -> int:
    return sum(tensor.numel() for tensor in program.parameters.values())
