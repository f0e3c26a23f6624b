"""Products of sorted rows with one matrix of many each: the layers of a mixture of experts.

Which rows an expert reads is in the data, so that its moment is that of its own rows. Experts are
many and their moments large: each is computed when it is asked for, and no two are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, fx

from torchlathe.ir.axes.rule import argument

__all__ = ["Routed", "RoutedMoments", "routed_reader"]


@dataclass(frozen=True, eq=False)
class Routed:
    """One such product.

    Attributes:
        node: The call.
        operand: The rows, (rows, features), those of one expert behind those of another.
        ends: What says where the rows of each expert end, (experts,).
    """

    node: fx.Node
    operand: fx.Node
    ends: fx.Node


def routed_reader(call: fx.Node) -> Routed | None:
    """The reader of a grouped product of two-dimensional rows; None of another form."""
    operand, ends = call.args[0], argument(call, "offs")
    if not isinstance(operand, fx.Node) or not isinstance(ends, fx.Node):
        return None
    return Routed(call, operand, ends) if operand.meta["val"].dim() == 2 else None


class RoutedMoments(Sequence[Tensor]):
    """The second moment of what each expert reads, (features, features), computed when asked for.

    Args:
        values: The rows of each batch.
        ends: Where those of each expert end, of each batch.
        dtype: Of the moments.

    Attributes:
        counts: How many rows each expert has in all batches together.
    """

    def __init__(
        self, values: Sequence[Tensor], ends: Sequence[Tensor], dtype: torch.dtype
    ) -> None:
        self._values, self._dtype, self._given = values, dtype, ends
        self._ends = [[0, *map(int, each.tolist())] for each in ends]
        self.counts = tuple(
            sum(each[expert + 1] - each[expert] for each in self._ends)
            for expert in range(len(self._ends[0]) - 1)
        )

    def with_more(self, values: Sequence[Tensor], ends: Sequence[Tensor]) -> RoutedMoments:
        """The moments of these rows and of others, given as for these."""
        return RoutedMoments([*self._values, *values], [*self._given, *ends], self._dtype)

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(index)
        features = self._values[0].shape[-1]
        total = self._values[0].new_zeros((features, features), dtype=self._dtype)
        for value, ends in zip(self._values, self._ends, strict=True):
            rows = value[ends[index] : ends[index + 1]].to(self._dtype)
            total.addmm_(rows.T, rows)
        return total.div_(max(self.counts[index], 1))
