"""Torch-Pruning on the same nets: train, prune at once, and fine-tune, in as many steps."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from torchlathe.tools.bench.quality.nets import Attention
from torchlathe.tools.bench.sparse_training.contestants import Run, Task, train

__all__ = ["PEER", "torch_pruning"]

PEER = "Torch-Pruning, magnitude"


def torch_pruning(task: Task, sparsity: float, seed: int) -> Run:
    """Half of the steps dense, then that share of the channels goes, then the other half.

    Globally by the L2 norm of its groups, with at most as large a share of a layer as the sparse
    optimizers take; of fused attention, the dimensions of heads.
    """
    import torch_pruning as tp

    torch.manual_seed(seed)
    model = task.make()
    whole = sum(p.numel() for p in model.parameters())
    half = Task(**{**vars(task), "steps": task.steps // 2})
    train(half, model, _adamw(model, task), seed, 1)
    model.eval()
    heads = {m.qkv: m.heads for m in model.modules() if isinstance(m, Attention)}
    more: dict[str, Any] = {"num_heads": heads, "prune_head_dims": True} if heads else {}
    with _quiet():
        pruner = tp.pruner.BasePruner(
            model,
            task.inputs[0][:1],
            importance=tp.importance.MagnitudeImportance(),
            global_pruning=True,
            ignored_layers=[model.get_submodule("head")],
            pruning_ratio=sparsity,
            max_pruning_ratio=1 - (1 - sparsity) * 2 / 3,
            **more,
        )
        pruner.step()
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.heads)
    train(half, model, _adamw(model, task), seed + 1, 1)
    kept = sum(p.numel() for p in model.parameters()) / whole
    return Run(task.metric(model.eval()), kept=kept, steps=2 * half.steps)


def _adamw(model: torch.nn.Module, task: Task) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
