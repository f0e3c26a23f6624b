"""Torch-Pruning on the same nets, down to the same sizes.

It is told what its documentation asks for: the heads of fused attention, the classifier to leave
alone, and what to patch afterwards. It prunes in many small steps, and the step that is nearest to
a size counts for it.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch.nn.functional as F
from torch import nn

from torchlathe.tools.bench.quality.nets import Attention, Digits, accuracy

__all__ = ["PEERS", "SCOPES", "prune"]

PEERS: Final = {
    "l2": "MagnitudeImportance",
    "lamp": "LAMPImportance",
    "taylor": "TaylorImportance",
}
SCOPES: Final = ("global", "local", "isomorphic")


def prune(
    model: nn.Module,
    data: Digits,
    importance: str,
    scope: str,
    sizes: Sequence[float],
    *,
    steps: int = 40,
) -> list[dict[str, float]]:
    """Sizes reached and accuracies there.

    Args:
        model: Not changed.
        data: Gradients are those of the calibration batches.
        importance: A key of `PEERS`.
        scope: One of `SCOPES`.
        sizes: Shares of the parameters to keep.
        steps: How many it takes to 10 % of the channels.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    score = getattr(tp.importance, PEERS[importance])()
    options: dict[str, Any] = {
        "global_pruning": scope != "local",
        "isomorphic": scope == "isomorphic",
        "ignored_layers": [model.get_submodule("head")],
        "iterative_steps": steps,
        "pruning_ratio": 0.9,
        "max_pruning_ratio": 0.95,
        **_heads(model),
    }
    whole = _count(model)
    reached: list[tuple[float, float]] = [(1.0, accuracy(model, data))]
    with _quiet():
        pruner = tp.pruner.BasePruner(model, data.test[0][:1], importance=score, **options)
        for _ in range(steps):
            if importance == "taylor":
                _backward(model, data)
            pruner.step()
            _patch(model, pruner)
            reached.append((_count(model) / whole, accuracy(model, data)))
            if reached[-1][0] < min(sizes) * 0.9:
                break
    rows = []
    for size in sizes:
        left, found = min(reached, key=lambda pair: abs(pair[0] - size))
        rows.append({"size": size, "left": left, "metric": found})
    return rows


def _heads(model: nn.Module) -> dict[str, Any]:
    heads = {m.qkv: m.heads for m in model.modules() if isinstance(m, Attention)}
    if not heads:
        return {}
    return {"num_heads": heads, "prune_num_heads": False, "prune_head_dims": True}


def _patch(model: nn.Module, pruner: Any) -> None:
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.heads)


def _backward(model: nn.Module, data: Digits) -> None:
    """Gradients over the whole calibration set, as its examples have it."""
    model.zero_grad()
    for images, labels in data.batches:
        F.cross_entropy(model(images), labels).backward()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
