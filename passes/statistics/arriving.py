"""Second moments of what layers read, one layer after the other, while the layers change.

What layer-by-layer methods need: each layer's data is that which the layers before it give *as
they are by then*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.passes.statistics.readers import Reader, patches, unfolds
from torchlathe.passes.statistics.routed import Routed, RoutedMoments
from torchlathe.passes.statistics.stepping import LockstepRun

__all__ = ["Arrival", "MomentSum", "arrivals"]

# Up to so many columns a moment is kept in float64.
_WIDE = 1024
# Elements of patches that are made at a time.
_MANY = 2**24


@dataclass(frozen=True)
class Arrival:
    """A layer at which all data has arrived.

    Attributes:
        reader: The layer.
        moments: Mean of x x' over the rows it reads, (features, features) for each group, float64,
            or float32 of more than 1,024 features; of experts computed when they are asked for.
        counts: How many rows each group reads.
    """

    reader: Reader | Routed
    moments: Sequence[torch.Tensor]
    counts: tuple[int, ...]


def arrivals(
    program: Program,
    batches: Sequence[Sequence[Any]],
    readers: Sequence[Reader | Routed],
    stops: Mapping[Reader | Routed, fx.Node] | None = None,
) -> Iterator[Arrival]:
    """The layers in order of execution; tensors may be changed before the next is asked for.

    Memory: what is live of all batches at once, and one moment.

    Args:
        program: What to run.
        batches: Flat inputs of each batch.
        readers: The layers; convolutions have to be of those that `patches` takes.
        stops: Of layers whose weight is computed, the first node that computes it, so that it is
            computed from tensors as they are after the change.
    """
    run = LockstepRun(program, batches)
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    last: tuple[object, Sequence[torch.Tensor], tuple[int, ...]] | None = None
    stops = stops or {}
    for reader in sorted(readers, key=lambda one: place[one.node]):
        run.run_until(stops.get(reader, reader.node))
        # Layers that read the same value in the same way have the same moment.
        key = (reader.operand, _way(reader))
        if last is None or last[0] != key:
            last = None  # two moments at a time would be one too many
            data = run.value(reader.operand)
            if isinstance(reader, Routed):
                routed = RoutedMoments(data, run.value(reader.ends), _kind(data[0]))
                last = (key, routed, routed.counts)
            else:
                last = (key, *_moments(reader, data))
        yield Arrival(reader, last[1], last[2])


def _kind(rows: torch.Tensor) -> torch.dtype:
    return torch.float64 if rows.shape[-1] <= _WIDE else torch.float32


def _way(reader: Reader | Routed) -> tuple[object, ...]:
    if isinstance(reader, Routed):
        return (reader.ends,)
    if not unfolds(reader):
        return (reader.data_axes, reader.read)
    weight: Any = reader.node.args[1]
    rest = fx.map_arg((reader.node.args[3:], reader.node.kwargs), lambda _: None)
    return (tuple(weight.meta["val"].shape[2:]), str(rest))


class MomentSum:
    """The sum of x x' over rows, for each group.

    Attributes:
        count: How many rows there are so far.
    """

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self.count = 0

    def add(self, reader: Reader, value: torch.Tensor) -> None:
        """Add what a layer reads."""
        for rows in _rows(reader, value):
            part = rows.to(_kind(rows))
            self.count += part.shape[1]
            if self._sum is None:
                self._sum = part.new_zeros((part.shape[0], part.shape[2], part.shape[2]))
            self._sum.baddbmm_(part.transpose(1, 2), part)

    def mean(self) -> torch.Tensor:
        """(groups, features, features); the sum becomes it."""
        assert self._sum is not None
        return self._sum.div_(max(self.count, 1))


def _moments(
    reader: Reader, values: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """That of each group, and how many rows it is of."""
    total = MomentSum()
    for value in values:
        total.add(reader, value)
    means = tuple(total.mean())
    return means, (total.count,) * len(means)


def _rows(reader: Reader, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """(groups, rows, features) of a batch, some at a time."""
    if not unfolds(reader):
        yield reader.data_rows(value)
        return
    few = max(1, _MANY // max(1, value[0].numel() * 9))
    for part in value.split(few):
        found = patches(reader, part)
        assert found is not None
        yield found
