"""Which experts become one: how many classes per layer, who leads them, and who joins whom.

Source: MC-SMoE (arXiv 2310.01334), sections 3.2 and 3.3 after its public code; ties are broken by
order here, so that the number of classes that was asked for is met (own). Clusters by average
linkage as in HC-SMoE (arXiv 2410.08589), a reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchlathe.ir import OptionError, PreconditionError

__all__ = [
    "Classes",
    "budgets",
    "clustered_classes",
    "kept_experts",
    "led_classes",
    "total_experts",
]


@dataclass(frozen=True)
class Classes:
    """Which experts become one.

    Attributes:
        numbers: The class of each expert, in the order of the leaders; shape (experts,) int64.
        leaders: The most used expert of each class, sorted; shape (classes,) int64.
    """

    numbers: torch.Tensor
    leaders: torch.Tensor


def total_experts(asked: float, extents: Sequence[int], *, where: str) -> int:
    """How many experts stay over all layers.

    Args:
        asked: A share of all experts below 1, else the number per layer on average.
        extents: Experts of each layer.
        where: Who asks, for the message.

    Raises:
        PreconditionError: More than there are.
    """
    whole = sum(extents)
    total = asked * whole if asked < 1 else asked * len(extents)
    if total > whole:
        raise PreconditionError(
            f"experts={asked:g} asks for more than the {whole} experts that {len(extents)} layers "
            "have",
            where=where,
            hint=f"give a share below 1, or up to {whole / len(extents):g} per layer",
        )
    # At least one per layer, and half an expert is rounded up.
    return max(math.floor(total + 0.5), len(extents))


def budgets(
    scores: Sequence[torch.Tensor], total: int, *, allocation: str, floors: Sequence[int]
) -> list[int]:
    """How many experts each layer keeps.

    ``global``: the best ``floor`` experts of each layer stay, and of all others those with the
    highest scores, whatever layer they are in; of equal scores the first. ``uniform``: the same
    share of each layer, and what does not divide goes to the first layers.

    Args:
        scores: Per layer, what experts are ranked by; shape (experts,), comparable across layers.
        total: Sum over all layers, at least that of ``floors``.
        allocation: ``global`` or ``uniform``.
        floors: The fewest that each layer has to keep.

    Returns:
        Per layer a number between its floor and its experts; they sum to ``total``, and none
        falls when ``total`` rises.
    """
    counts = list(floors)
    if allocation == "uniform":
        return _uniform([len(each) for each in scores], counts, total)
    ranked = []
    for layer, each in enumerate(scores):
        order = _by_score(each)
        ranked += [(-float(each[e]), layer, place) for place, e in enumerate(order)]
    free = [entry for entry in sorted(ranked) if entry[2] >= counts[entry[1]]]
    for _, layer, _ in free[: max(0, total - sum(counts))]:
        counts[layer] += 1
    return counts


def _uniform(extents: Sequence[int], counts: list[int], total: int) -> list[int]:
    """One expert at a time to the layer that has the smallest share of its own."""
    while sum(counts) < total:
        open_ = [i for i, extent in enumerate(extents) if counts[i] < extent]
        counts[min(open_, key=lambda i: (counts[i] / extents[i], i))] += 1
    return counts


def kept_experts(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The experts with the highest scores, in their order; shape (count,) int64."""
    return torch.tensor(sorted(_by_score(scores)[:count]), dtype=torch.int64)


def led_classes(similarity: torch.Tensor, usage: torch.Tensor, count: int) -> Classes:
    """The most used experts lead a class each; the others join the most similar leader.

    Two leaders may well be alike: that nobody else is, is not asked for.

    Args:
        similarity: Shape (experts, experts); higher is more similar.
        usage: Shape (experts,).
        count: Number of classes.
    """
    leaders = kept_experts(usage, count)
    closest = similarity[:, leaders].argmax(dim=1)
    closest[leaders] = torch.arange(count)
    return Classes(closest, leaders)


def clustered_classes(similarity: torch.Tensor, usage: torch.Tensor, count: int) -> Classes:
    """The two classes with the highest mean similarity between members become one, in turn.

    Args:
        similarity: Shape (experts, experts); higher is more similar.
        usage: Shape (experts,); the most used of a class leads it.
        count: Number of classes.
    """
    clusters = [[e] for e in range(len(usage))]
    while len(clusters) > count:
        pairs = [(i, j) for j in range(len(clusters)) for i in range(j)]
        i, j = max(pairs, key=lambda p: _between(similarity, clusters[p[0]], clusters[p[1]]))
        clusters[i] += clusters.pop(j)
    led = sorted((max(c, key=lambda e: (float(usage[e]), -e)), c) for c in clusters)
    numbers = torch.empty(len(usage), dtype=torch.int64)
    for number, (_, members) in enumerate(led):
        numbers[members] = number
    return Classes(numbers, torch.tensor([leader for leader, _ in led]))


def _between(similarity: torch.Tensor, some: list[int], others: list[int]) -> float:
    """Mean similarity of the members of two classes, which need not be symmetric."""
    both = similarity[some][:, others].mean() + similarity[others][:, some].mean()
    return float(both) / 2


def _by_score(scores: torch.Tensor) -> list[int]:
    """Experts from the highest score to the lowest; of equal ones the first."""
    if not bool(scores.isfinite().all()):
        raise OptionError("scores of experts are not finite", hint="look for NaN in the model")
    return sorted(range(len(scores)), key=lambda e: (-float(scores[e]), e))
