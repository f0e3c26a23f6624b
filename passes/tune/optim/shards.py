"""What of a distributed tensor this process has.

A parameter of a fully sharded model (FSDP2) is a ``DTensor``. Zeroing is local to each process;
sums over a group are added up over the processes that have parts of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from torchlathe.ir import UnsupportedError

__all__ = ["Meshes", "Shard", "all_reduced", "is_sharded", "like", "local", "shard_of"]

# Process groups that a tensor is split over.
Meshes: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Shard:
    """A part of a tensor along one axis.

    Attributes:
        dim: The axis that is split; None where this process has all of it.
        start: First index of the axis that this process has.
        stop: One after the last.
        meshes: Process groups over which parts have to be added up.
    """

    dim: int | None = None
    start: int = 0
    stop: int = 0
    meshes: Meshes = ()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or what this process has of it; writing to it writes to the tensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    found: torch.Tensor = tensor.to_local().detach()  # type: ignore[attr-defined]
    return found


def like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A value on the device of a tensor, and split over processes as that is."""
    if not is_sharded(own) or is_sharded(value):
        return value.to(own.device)
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = own.device_mesh  # type: ignore[attr-defined]
    placements: Any = own.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(own.device), mesh, placements)


def shard_of(tensor: torch.Tensor, name: str) -> Shard:
    """Which part of a tensor this process has.

    Raises:
        UnsupportedError: It is split over two meshes at once, or holds partial sums.
    """
    if not is_sharded(tensor):
        return Shard()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    found = Shard()
    for place, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_replicate():
            continue
        plain = placement.is_shard() and type(placement).__name__ == "Shard"
        if not plain or found.meshes:
            raise UnsupportedError(
                f"{name} is placed as {placement}",
                hint="sparse optimizers take parameters that are split along one axis (FSDP2)",
            )
        # As torch.chunk cuts: equal parts, of which the last ones may be short or empty.
        extent, count = tensor.shape[placement.dim], mesh.size(place)
        each = -(-extent // count)
        start = min(extent, each * mesh.get_local_rank(place))
        found = Shard(
            placement.dim % tensor.dim(),
            start,
            min(extent, start + each),
            (mesh.get_group(place),),
        )
    return found


def all_reduced(values: torch.Tensor, meshes: Meshes) -> torch.Tensor:
    """The sum over processes; on the device that their means of communication needs."""
    if not meshes:
        return values
    import torch.distributed as dist

    for group in meshes:
        device = "cpu" if dist.get_backend(group) == "gloo" else torch.device("cuda")
        moved = values.to(device)
        dist.all_reduce(moved, group=group)
        values = moved.cpu()
    return values
