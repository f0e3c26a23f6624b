"""The graph of a program as it computes in training.

A program is captured in eval mode, as ``torch.export`` writes it then: batch norm with its
running statistics, dropout as a call that passes its input on. For training, a copy of the graph
has both switched; the program itself keeps the graph that it has, so that nothing has to be
switched back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from torchlathe.ir import InputError
from torchlathe.ir.program import copy_graph
from torchlathe.ir.provenance import info

__all__ = ["computing_again", "statistics_of_norms", "training_graph"]

_ATEN = torch.ops.aten
_NORM = _ATEN.batch_norm.default
_CORE_NORM = _ATEN._native_batch_norm_legit_no_training.default
_DROPOUTS = frozenset(
    {
        _ATEN.dropout.default,
        _ATEN.native_dropout.default,
        _ATEN.feature_dropout.default,
        _ATEN.alpha_dropout.default,
        _ATEN.feature_alpha_dropout.default,
    }
)

_again: ContextVar[bool] = ContextVar("computing_again", default=False)


@contextmanager
def computing_again() -> Iterator[None]:
    """Activations are computed once more for gradients: running statistics follow only once."""
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)


def training_graph(graph: fx.Graph, *, batch_norm: bool, dropout: bool) -> fx.Graph:
    """A copy of a graph, with nodes of the same names, that computes as in training.

    Args:
        graph: As captured in eval mode.
        batch_norm: Normalise by the batch, and write to the running statistics in place.
        dropout: Draw dropout. What capture leaves no call of (stochastic depth, and the dropout
            inside of fused attention) stays as it is in eval mode.
    """
    copy = copy_graph(graph)
    for node in copy.nodes:
        if batch_norm and node.target is _NORM and node.args[3] is not None and not node.args[5]:
            node.target = norm_in_training
            node.args = (*node.args[:5], *node.args[6:8])
        elif batch_norm and node.target is _CORE_NORM:
            node.target = _core_norm_in_training
        elif dropout and node.target in _DROPOUTS:
            node.args = (*node.args[:2], True)
            node.kwargs = {}
    return copy


def statistics_of_norms(graph: fx.Graph) -> set[str]:
    """Names of the tensors that hold running statistics."""
    found: set[str] = set()
    for node in graph.nodes:
        if node.target in (_NORM, _CORE_NORM):
            read = [a for a in node.args[3:5] if isinstance(a, fx.Node)]
            found.update(name for a in read if (name := info(a).tensor) is not None)
    return found


def norm_in_training(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """Batch norm by the statistics of the batch, over all processes together.

    Args:
        x: (N, C, ...).
        weight: (C,).
        bias: (C,).
        mean: Running mean, (C,); written to.
        var: Running variance, (C,); written to.
        momentum: Share of the batch's statistics in the new running ones.
        eps: Added to the variance.

    Raises:
        InputError: One value per channel, which has no variance.
    """
    if _again.get():
        mean, var = mean.clone(), var.clone()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _norm_over_processes(x, weight, bias, mean, var, momentum, eps)
    if x.numel() == x.shape[1]:
        raise InputError(
            "batch norm in training needs more than one value per channel",
            hint="train with larger batches, or keep the running statistics: batch_norm=false",
        )
    return torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, False)


def _core_norm_in_training(
    x: torch.Tensor, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # What the op of the core set gives in eval mode beside its result is empty.
    return (
        norm_in_training(x, weight, bias, mean, var, momentum, eps),
        x.new_empty(0),
        x.new_empty(0),
    )


def _norm_over_processes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """As torch's SyncBatchNorm, which has no kernels for the CPU."""
    wide = x.float()
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = torch.tensor([float(x.numel() // x.shape[1])], device=x.device)
    sums = _sum_over_processes(torch.cat([wide.sum(axes), count]))
    total = sums[-1].detach()
    centre = sums[:-1] / total
    shifted = wide - centre.reshape(shape)
    spread = _sum_over_processes(shifted.square().sum(axes)) / total
    with torch.no_grad():
        mean.lerp_(centre.to(mean.dtype), momentum)
        var.lerp_((spread * (total / (total - 1).clamp(min=1))).to(var.dtype), momentum)
    result = shifted * (spread + eps).rsqrt().reshape(shape)
    if weight is not None:
        result = result * weight.reshape(shape)
    if bias is not None:
        result = result + bias.reshape(shape)
    return result.to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is that of all of them."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_processes(value: torch.Tensor) -> torch.Tensor:
    total: torch.Tensor = _Sum.apply(value)  # type: ignore[no-untyped-call]
    return total
