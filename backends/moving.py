"""Following ``.to(dtype)`` and ``.to(device)``: literals and metadata move with the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Error, Program, UnsupportedError
from torchlathe.ir.edit import fake_run

__all__ = ["Place", "moved", "places_after"]

Place = tuple[torch.dtype, torch.device]


def places_after(
    tensors: list[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]
) -> dict[Place, Place]:
    """Where a conversion would put tensors, found by converting an empty one of each kind.

    Returns:
        Old place to new place, only for those that change.
    """
    seen = {(tensor.dtype, tensor.device) for tensor in tensors}
    changed = {}
    for dtype, device in seen:
        probe = function(torch.empty(0, dtype=dtype, device=device))
        if (probe.dtype, probe.device) != (dtype, device):
            changed[dtype, device] = (probe.dtype, probe.device)
    return changed


def moved(program: Program, places: Mapping[Place, Place]) -> Program:
    """A copy of the program for tensors that are about to be converted.

    Literal devices and dtypes in the graph follow their tensors, and so do the inputs: after
    ``.to(torch.bfloat16)`` the model takes bfloat16, and a cast that captured code made to float32
    casts to bfloat16.

    Raises:
        UnsupportedError: The graph does not work in the new place.
    """
    dtypes = {old[0]: new[0] for old, new in places.items() if old[0] != new[0]}
    devices = {old[1].type: new[1] for old, new in places.items() if old[1] != new[1]}

    def literal(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtypes.get(value, value)
        if isinstance(value, torch.device):
            return devices.get(value.type, value)
        return value

    other = program.copy()
    mode = program.fake_mode
    try:
        for node in other.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder" and isinstance(value, torch.Tensor):
                with mode:
                    node.meta["val"] = torch.empty_strided(
                        value.shape,
                        value.stride(),
                        dtype=literal(value.dtype),
                        device=literal(value.device),
                    )
            elif node.op == "call_function":
                node.args = fx.node.map_aggregate(node.args, literal)
                node.kwargs = fx.node.map_aggregate(node.kwargs, literal)
                node.meta["val"] = fake_run(node, mode)
                node.meta.pop("tensor_meta", None)
    except Error as error:
        to = ", ".join(sorted({f"{dtype} on {device}" for dtype, device in places.values()}))
        raise UnsupportedError(
            f"the captured graph does not work as {to}: {error.message}",
            where=error.where,
            hint="convert the model first, and compile it then",
        ) from error
    other.graph_module.recompile()
    other.version += 1
    return other
