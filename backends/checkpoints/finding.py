"""Which linear layers of a program are stored in few bits, and what a file cannot say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from torchlathe.backends.checkpoints.stored import Stored
from torchlathe.ir import Program, UnsupportedError, describe, info

__all__ = ["stored_layers"]

aten = torch.ops.aten
_PACKED = re.compile(r"_packed\d*$")
_CACHES = ("torchlathe.quantize_cache.default", "torchlathe.dequantize_cache.default")


def stored_layers(program: Program) -> dict[str, Stored]:
    """The quantised linear layers by the paths of their modules.

    Raises:
        UnsupportedError: Numbers that another op than a linear layer reads, or fused ops.
    """
    found: dict[str, Stored] = {}
    known: set[fx.Node] = set()
    for node in program.nodes:
        if str(node.target) == "torchlathe.dequantize.default":
            path, stored, own = _layer(program, node)
            found[path] = stored
            known |= own
    for node in program.nodes:
        if node.op == "call_function" and node not in known:
            _refuse(node)
    return found


def _refuse(node: fx.Node) -> None:
    """Raise for an op that the code of the model does not have."""
    if _rounds(node):
        raise UnsupportedError(
            "a checkpoint says of quantised linear layers alone that their input is rounded",
            where=describe(node),
            hint="leave the layer that reads it out of quantize, exclude=[...]",
        )
    if str(node.target) in _CACHES:
        raise UnsupportedError(
            "a checkpoint has no place for keys and values in few bits",
            where=describe(node),
            hint="leave quantize-cache out: those who serve a checkpoint have options of their own",
        )
    if str(node.target).startswith("torchlathe."):
        raise UnsupportedError(
            f"a checkpoint has no place for the fused op {node.target}",
            where=describe(node),
            hint="it is made of quantize{...} without fuse-kernels: compile with "
            'backend="checkpoint", which fuses nothing',
        )
    if info(node).created_by:
        raise UnsupportedError(
            "a pass added an op, which the code of the model does not have",
            where=describe(node),
            hint="a checkpoint holds what the values of tensors can say; compiled.save(path) "
            "keeps every model",
        )


def _layer(program: Program, node: fx.Node) -> tuple[str, Stored, set[fx.Node]]:
    """Path of a layer, what it stores, and the nodes that it consists of."""
    values, scales, zeros, total, columns, group, form, dtype = _arguments(node)
    name = info(values).tensor if isinstance(values, fx.Node) else None
    if name is None:
        raise UnsupportedError(
            "the numbers of a layer are no tensor of the model",
            where=describe(node),
            hint="leave embeddings=true out: rows that are looked up have no place in the format",
        )
    path, _, leaf = name.rpartition(".")
    if _PACKED.sub("", leaf) != "weight":
        raise UnsupportedError(
            f"{name} is not the weight of a linear layer", where=describe(node), hint=_exclude(name)
        )

    calls = list(_products(node))

    def tensor(used: Any) -> torch.Tensor | None:
        own = info(used).tensor if isinstance(used, fx.Node) else None
        return None if own is None else program.entries[own].tensor.detach()

    inputs = [call.args[0] for call in calls]
    rounds = {_rounding(data, name) for data in inputs}
    if len(rounds) != 1:
        raise UnsupportedError(f"calls of {path} treat their inputs differently", where=name)
    numbers, steps = tensor(values), tensor(scales)
    assert numbers is not None
    assert steps is not None
    return (
        path,
        Stored(
            numbers, steps, tensor(zeros), tensor(total), columns or numbers.shape[1], group, form,
            dtype, rounds.pop(),
        ),
        {node, *calls, *(data for data in inputs if isinstance(data, fx.Node) and _rounds(data))},
    )  # fmt: skip


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    names = ("values", "scales", "zeros", "total", "columns", "group", "format", "dtype")
    return tuple(
        node.args[i] if i < len(node.args) else node.kwargs.get(name)
        for i, name in enumerate(names)
    )


def _products(node: fx.Node) -> Iterator[fx.Node]:
    """The linear layers that read a dequantised weight.

    Raises:
        UnsupportedError: Something else does.
    """
    for user in node.users:
        if user.target is not aten.linear.default or user.args[1] is not node:
            raise UnsupportedError(
                "the format stores the weights of nn.Linear, and something else reads this one",
                where=describe(user),
                hint="leave the layer out of quantize, exclude=[...]; convolutions, experts, "
                "embeddings and transposed weights have no place in it",
            )
        yield user


def _rounds(node: fx.Node) -> bool:
    return str(node.target) == "torchlathe.quantize_dequantize_tokens.default"


def _rounding(data: Any, name: str) -> str | None:
    if not isinstance(data, fx.Node) or not _rounds(data):
        return None
    axes: Any = data.args[1]
    rank = len(data.meta["val"].shape)
    if [axis % rank for axis in axes] != [rank - 1]:
        raise UnsupportedError(f"the input of {name} is rounded along {list(axes)}", where=name)
    return str(data.args[2])


def _exclude(name: str) -> str:
    return f'leave it out of quantize, exclude=["{name}"]'
