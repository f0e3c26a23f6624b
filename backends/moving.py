"""Following ``.to(dtype)`` and ``.to(device)``: literals and metadata move with the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from torchlathe.ir import Error, Program, UnsupportedError, VerifyError, describe
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
    try:
        for node in other.nodes:
            if node.op in ("placeholder", "call_function"):
                _move(node, program.fake_mode, literal)
    except Error as error:
        to = ", ".join(sorted({f"{dtype} on {device}" for dtype, device in places.values()}))
        raise UnsupportedError(
            f"the captured graph does not work as {to}: {error.message}",
            where=error.where,
            hint="convert the model first, and compile it then",
        ) from error
    other.version += 1
    return other


def _move(node: fx.Node, mode: FakeTensorMode, literal: Callable[[Any], Any]) -> None:
    value = node.meta.get("val")
    if node.op == "call_function":
        node.args = fx.node.map_aggregate(node.args, literal)
        node.kwargs = fx.node.map_aggregate(node.kwargs, literal)
        _follow(node, mode, literal)
    elif isinstance(value, torch.Tensor):
        with mode:
            node.meta["val"] = torch.empty_strided(
                value.shape,
                value.stride(),
                dtype=literal(value.dtype),
                device=literal(value.device),
            )


def _follow(node: fx.Node, mode: FakeTensorMode, literal: Callable[[Any], Any]) -> None:
    """Work out a node's value in the new place, where its dtypes must have followed."""
    wanted = [literal(dtype) for dtype in _dtypes(node.meta["val"])]
    value = fake_run(node, mode)
    creates = isinstance(node.target, torch._ops.OpOverload) and any(
        argument.name == "dtype" for argument in node.target._schema.arguments
    )
    if _dtypes(value) != wanted and creates and node.kwargs.get("dtype") is None:
        # Made in the default dtype, which was the model's own when it was captured.
        node.kwargs = {**node.kwargs, "dtype": wanted[0]}
        value = fake_run(node, mode)
    if _dtypes(value) != wanted:
        raise VerifyError(
            f"{node.target} gives {_dtypes(value)[0]} whatever its inputs are",
            where=describe(node),
        )
    node.meta["val"] = value
    node.meta.pop("tensor_meta", None)


def _dtypes(value: Any) -> list[torch.dtype]:
    values = value if isinstance(value, list | tuple) else [value]
    return [item.dtype for item in values if isinstance(item, torch.Tensor)]
