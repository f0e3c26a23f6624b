"""Costs of erasing each unit of a family, all units at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch

from torchlathe.passes.analysis.curvature.factors import LayerCurvature
from torchlathe.passes.analysis.families import Family, ParameterSlice

__all__ = ["Over", "pair_costs", "parts_of", "sliced"]

Over: TypeAlias = Literal["writers", "readers", "all"]


def parts_of(family: Family, floating: Iterable[str], over: Over) -> list[ParameterSlice]:
    """The slices of floating parameters that are zeroed.

    Args:
        family: The family.
        floating: Names of the parameters that there is a curvature of.
        over: "writers" for those that the equal full-size model has at zero, "readers" for those
            that read the unit, "all" for both.
    """
    names = set(floating)
    zeroed = family.zeroed or family.writers
    if over == "all":
        chosen = family.slices
    elif over == "writers":
        chosen = zeroed
    else:
        chosen = family.readers or zeroed
    return [part for part in chosen if part.name in names]


def sliced(tensor: torch.Tensor, axis: int, values: torch.Tensor) -> torch.Tensor:
    """A vector along an axis, broadcast to a tensor's shape."""
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return values.reshape(shape).expand(tensor.shape)


def pair_costs(
    layer: LayerCurvature,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    part: ParameterSlice,
    owner: torch.Tensor,
    extent: int,
) -> torch.Tensor | None:
    """``tr(G dW A dW')`` of zeroing each unit's rows, or its columns, of one weight.

    Args:
        layer: The curvature of the layer.
        weight: Its weight.
        bias: Its bias where the unit owns that too; it goes with the rows.
        part: The slice.
        owner: Unit of each index of the slice's axis, -1 for none.
        extent: Number of units.

    Returns:
        Shape (extent,), float64; None if the units are neither rows nor columns of the matrix.
    """
    marks = sliced(weight, part.axis, owner).to(torch.int32).contiguous()
    matrix = layer.moments.weight_matrix(marks)
    if bool((matrix == matrix[:, :, :1]).all()):
        units = matrix[:, :, 0]
        found = layer.row_products(weight, bias)
    elif bool((matrix == matrix[:, :1]).all()):
        units = matrix[:, 0]
        found = layer.column_products(weight)
    else:
        return None
    same = (units[:, :, None] == units[:, None, :]) & (units >= 0)[:, :, None]
    per_index = (found * same.to(found.device)).sum(2, dtype=torch.float64).cpu()
    mine = units.cpu() >= 0
    total = torch.zeros(extent, dtype=torch.float64)
    return total.index_add_(0, units.cpu()[mine].long(), per_index[mine])
