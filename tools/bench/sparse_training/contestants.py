"""Ways to train a net to a group sparsity, all for the same number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

import torchlathe as tl
from torchlathe import optim
from torchlathe.passes import ZeroInvariantGroups

__all__ = ["METHODS", "Run", "Task", "one_run"]

Batch = Any


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        make: The untrained net.
        inputs: Of the capture.
        batches: So many batches to train on.
        loss: Of a net on a batch.
        metric: Of a net in eval mode.
        steps: Of the whole training.
        rate: Highest learning rate.
        options: For every sparse optimizer.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    metric: Callable[[nn.Module], float]
    steps: int
    rate: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What one training came to.

    Attributes:
        metric: Of the trained net.
        groups: Number of groups.
        zero: How many of them are zero, counted in the weights.
        kept: Share of the parameters that is left after the erase.
        error: Largest difference of an output, erased to trained, over the largest output.
        steps: Of the training.
    """

    metric: float
    groups: int = 0
    zero: int = 0
    kept: float = 1.0
    error: float = 0.0
    steps: int = 0


def _hesso(steps: int) -> dict[str, Any]:
    return {"start_step": steps // 10, "pruning_steps": steps // 2, "periods": 10}


def _cric(steps: int) -> dict[str, Any]:
    return {
        "start_step": steps // 10,
        "pruning_steps": steps // 4,
        "sampling_steps": max(2, steps // 80),
        "max_cycles": 5,
    }


def _half_space(steps: int) -> dict[str, Any]:
    return {"start_step": steps // 10, "pruning_steps": steps // 2}


# The class and its schedule; one-shot makes all groups zero at once, half way.
METHODS: Final[dict[str, tuple[Any, Callable[[int], dict[str, Any]]] | None]] = {
    "dense": None,
    "HESSO": (optim.HESSO, _hesso),
    "HESSO-CRIC": (optim.HESSOCRIC, _cric),
    "DHSPG": (optim.DHSPG, _half_space),
    "HSPG": (optim.HSPG, _half_space),
    "magnitude, one shot": (
        optim.HESSO,
        lambda steps: {"start_step": steps // 2, "pruning_steps": 1, "saliency": "magnitude"},
    ),
}


def one_run(task: Task, method: str, sparsity: float, seed: int, **more: Any) -> Run:
    """Train from scratch, and erase what is zero.

    Args:
        task: What.
        method: A key of `METHODS`.
        sparsity: Share of the groups; not used by "dense".
        seed: Of weights and data.
        more: Further options of the optimizer.
    """
    torch.manual_seed(seed)
    model = task.make()
    chosen = METHODS[method]
    steps = task.steps
    optimizer: torch.optim.Optimizer
    sparse: optim.SparseOptimizer | None = None
    if chosen is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    else:
        make, schedule = chosen
        groups = tl.capture(model.eval(), task.inputs).analysis(ZeroInvariantGroups)
        options = {**task.options, **schedule(steps), **more}
        optimizer = sparse = make(
            groups, model, target_sparsity=sparsity, lr=task.rate, weight_decay=0.01, **options
        )
    parts = 2 if method == "magnitude, one shot" else 1
    train(task, model, optimizer, seed, parts)
    model.eval()
    if sparse is None:
        return Run(task.metric(model), steps=steps)
    return _erased(task, model, sparse)


def train(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, parts: int
) -> None:
    """All steps, under as many one-cycle schedules as there are parts."""
    model.train()
    each = task.steps // parts
    data = task.batches(seed)
    for _ in range(parts):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=each)
        for _ in range(each):
            loss = task.loss(model, next(data))
            optimizer.zero_grad()
            loss.backward()
            if isinstance(optimizer, optim.SparseOptimizer):
                optimizer.step(loss=loss.detach())
            else:
                optimizer.step()
            schedule.step()


@torch.no_grad()
def _erased(task: Task, model: nn.Module, sparse: optim.SparseOptimizer) -> Run:
    small = tl.compile(
        model, "structured-erase{zeros=true}", task.inputs, measure_latency=False, verify="off"
    )
    want, got = model(*task.inputs), small(*task.inputs)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    return Run(
        task.metric(model),
        sparse.table.count,
        int(sparse.table.zero().sum()),
        sizes[0] / sizes[1],
        float((got - want).abs().max() / want.abs().max()),
        task.steps,
    )
