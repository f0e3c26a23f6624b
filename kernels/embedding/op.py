"""``torchlathe::quantised_embedding``: rows of a stored table, dequantised as they are looked up.

The table stays in few bits, and what is read of it is what was asked for. Inductor makes one kernel
of it; there is nothing to win by another. Source: own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.dequantize.formats import format_of
from torchlathe.kernels.dequantize.op import meaning
from torchlathe.kernels.registering import register

__all__ = ["quantised_embedding", "reference"]


def reference(
    indices: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    total: Tensor | None,
    *,
    columns: int,
    group: int,
    format: str,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The meaning of the op: the whole table is dequantised, and then looked up."""
    table = meaning(values, scales, zeros, total, columns, group, format_of(format), dtype)
    return F.embedding(indices, table)


@register("quantised_embedding")
def quantised_embedding(
    indices: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    total: Tensor | None,
    columns: int,
    group: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize(values, ...)[indices]`` without the table in floating numbers.

    Args:
        indices: (...), integers.
        values: (rows, stored columns), as `torchlathe.kernels.dequantize.op.dequantize` takes it.
        scales: (rows, groups).
        zeros: (rows, groups), or None.
        total: Shape (), or None.
        columns: Numbers in a row, where they are packed.
        group: Numbers of a row that share a scale; 0 for a whole row.
        format: One of `torchlathe.kernels.dequantize.formats.FORMATS`.
        dtype: Of the result.

    Returns:
        (..., columns).

    Raises:
        OptionError: There is no such format.
    """
    rows = [
        None if table is None else F.embedding(indices, table) for table in (values, scales, zeros)
    ]
    assert rows[0] is not None
    assert rows[1] is not None
    form = format_of(format)
    return meaning(rows[0], rows[1], rows[2], total, columns, group, form, dtype)
