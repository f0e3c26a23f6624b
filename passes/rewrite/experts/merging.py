"""The weights of merged experts.

Source: MC-SMoE (arXiv 2310.01334), equation for the frequency-weighted merge, after its public
code; ``reversed`` is a reconstruction of the ablation of that name.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from torchlathe.ir import Program
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.rewrite.experts.alignment import Alignment, Expert, expert_of
from torchlathe.passes.rewrite.experts.grouping import Classes

__all__ = ["Weighting", "merge_weights", "merged_tensors", "weight_similarity"]

Weighting: TypeAlias = Literal["frequency", "uniform", "reversed"]


def merge_weights(usage: torch.Tensor, weighting: Weighting) -> torch.Tensor:
    """How much each member of a class counts; none is negative, and they sum to 1.

    Args:
        usage: Of the members; shape (members,).
        weighting: By usage, all the same, or the least used as if it were the most used.
    """
    if weighting == "reversed":
        order = usage.argsort(stable=True)
        usage = usage.clone().index_copy(0, order, usage[order].flip(0))
    total = usage.sum()
    if weighting == "uniform" or not bool(total > 0):
        return torch.full_like(usage, 1 / len(usage))
    return usage / total


def merged_tensors(
    program: Program,
    layer: ExpertLayer,
    classes: Classes,
    usage: torch.Tensor,
    *,
    weighting: Weighting,
    alignment: Alignment | None,
) -> dict[str, torch.Tensor]:
    """The tensors of a layer with one expert per class.

    Args:
        program: Of the layer.
        layer: Whose experts to merge.
        classes: Which experts become one.
        usage: Share of the picks of each expert; shape (experts,).
        weighting: How members of a class are weighed.
        alignment: Brings members to the order of the most used one; None leaves them as they are.

    Returns:
        By name, with as many indices on the axis of experts as there are classes.
    """
    merged: list[Expert] = []
    for number, leader in enumerate(classes.leaders.tolist()):
        members = (classes.numbers == number).nonzero().flatten().tolist()
        if len(members) == 1:
            merged.append(expert_of(program, layer, members[0]))  # bit for bit as it was
            continue
        weights = merge_weights(usage[members].double(), weighting)
        merged.append(_mean(program, layer, members, weights.tolist(), leader, alignment))
    return {
        name: torch.stack([expert[name] for expert in merged], dim=axis).contiguous()
        for name, axis in layer.tensors.items()
    }


def _mean(
    program: Program,
    layer: ExpertLayer,
    members: list[int],
    weights: list[float],
    leader: int,
    alignment: Alignment | None,
) -> Expert:
    reference: Expert = expert_of(program, layer, leader)
    if alignment is not None:
        reference = alignment.balanced(reference)
    sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in reference.items()}
    for member, weight in zip(members, weights, strict=True):
        expert = reference
        if member != leader:
            expert = expert_of(program, layer, member)
            if alignment is not None:
                expert = alignment.align(reference, alignment.balanced(expert))
        for name, tensor in expert.items():
            sums[name] += weight * tensor.double()
    return {name: total.to(reference[name].dtype) for name, total in sums.items()}


def weight_similarity(
    program: Program, layer: ExpertLayer, reference: int, alignment: Alignment | None
) -> torch.Tensor:
    """Cosines of the experts' weights as vectors, aligned to one of them.

    Args:
        program: Of the layer.
        layer: Whose experts to compare.
        reference: The expert whose order of units the others are brought to.
        alignment: None compares them as they are.

    Returns:
        Shape (experts, experts) float64.
    """
    anchor: Expert = expert_of(program, layer, reference)
    if alignment is not None:
        anchor = alignment.balanced(anchor)
    rows = []
    for number in range(layer.experts):
        expert = anchor
        if number != reference:
            expert = expert_of(program, layer, number)
            if alignment is not None:
                expert = alignment.align(anchor, alignment.balanced(expert))
        row = torch.cat([expert[name].flatten() for name in layer.tensors]).float()
        rows.append(row / row.norm().clamp_min(torch.finfo(row.dtype).tiny))
    stacked = torch.stack(rows)
    return (stacked @ stacked.T).double().cpu()
