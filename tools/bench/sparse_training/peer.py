"""Torch-Pruning on the same nets: train, prune at once, and fine-tune, in as many steps."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Container, Iterator
from typing import Any, Final

import torch

from torchlathe.tools.bench.quality.nets import Attention
from torchlathe.tools.bench.sparse_training.contestants import Run, Task, train

__all__ = ["PEER", "torch_pruning"]

PEER = "Torch-Pruning, magnitude"


# Torch-Pruning looks at its bound on a layer only before a step: in one step of 70 % it left two
# of 64 channels between the layers of a transformer, which layer norms make signs of.
_STEPS: Final = 80


def torch_pruning(task: Task, sparsity: float, seed: int) -> Run:
    """Half of the steps dense, then that share of the channels goes, then the other half.

    Globally by the L2 norm of its groups, in small steps, with at most as large a share of a layer
    as the sparse optimizers take. Of fused attention, dimensions of heads may go; rotary positions
    pair them, which Torch-Pruning does not see, so that heads of a Llama stay whole.
    """
    import torch_pruning as tp

    torch.manual_seed(seed)
    model = task.make()
    whole = sum(p.numel() for p in model.parameters())
    half = Task(**{**vars(task), "steps": task.steps // 2})
    train(half, model, _adamw(model, task), seed, 1)
    model.eval()
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    heads = {m.qkv: m.heads for m in attentions}
    whole_heads = {
        m: n_heads
        for body in model.children()
        if (n_heads := getattr(getattr(body, "config", None), "num_attention_heads", 0))
        for name, m in body.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    head = next(m for n, m in model.named_modules() if n in ("head", "body.lm_head"))
    largest = 1 - (1 - sparsity) * 2 / 3
    with _quiet():
        pruner = tp.pruner.BasePruner(
            model,
            task.inputs[0][:1],
            importance=tp.importance.MagnitudeImportance(),
            global_pruning=True,
            ignored_layers=[head],
            pruning_ratio=1.0,
            max_pruning_ratio=largest,
            iterative_steps=_STEPS,
            num_heads=heads | whole_heads,
            prune_head_dims=bool(heads),
        )
        groups = _channels(pruner, whole_heads)
        for _ in range(_STEPS):
            if groups - _channels(pruner, whole_heads) >= int(sparsity * groups):
                break
            pruner.step()
        gone = groups - _channels(pruner, whole_heads)
    for module in attentions:
        module.heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.heads)
    train(half, model, _adamw(model, task), seed + 1, 1)
    kept = sum(p.numel() for p in model.parameters()) / whole
    return Run(task.metric(model.eval()), groups, gone, kept, steps=2 * half.steps)


def _channels(pruner: Any, left: Container[Any]) -> int:
    """Channels that may go; of attention, dimensions of heads, which are alike in all of them."""
    count = 0
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        root = group[0].dep.target.module
        if root in left:
            continue
        count += len(group[0].idxs) // (3 * pruner.num_heads.get(root, 1 / 3))
    return int(count)


def _adamw(model: torch.nn.Module, task: Task) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
