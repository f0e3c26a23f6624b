"""Running a program node by node: for checking, in other dtypes, with other tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["ReplaceTensor", "run_flat"]

_LOOK_UPS = frozenset({torch.ops.aten.embedding.default})

ReplaceTensor = Callable[[str, torch.Tensor], torch.Tensor]


def run_flat(
    program: Program,
    flat_inputs: Sequence[Any],
    *,
    replace_tensor: ReplaceTensor | None = None,
    dtype: torch.dtype | None = None,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> list[Any]:
    """Run the graph on flat inputs and return flat outputs.

    A tensor of the program is replaced and converted for each op that reads it and freed right
    after, so that a float64 run needs activations and few weights at a time, not a second model.

    Args:
        program: What to run.
        flat_inputs: In the order of ``program.input_nodes``.
        replace_tensor: Called with each tensor's name and value; the result is used instead.
        dtype: Floating tensors and floating ``dtype=`` arguments become this.
        observe: Called with each call node and its value.
    """
    last_use: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        for used in node.all_input_nodes:
            last_use[used] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last_use.items():
        dying.setdefault(user, []).append(used)

    values: dict[fx.Node, Any] = dict(zip(program.input_nodes, flat_inputs, strict=True))
    if dtype is not None:
        values = {node: _convert(value, dtype) for node, value in values.items()}

    def fetch(node: fx.Node, dtype: torch.dtype | None = dtype) -> Any:
        if node in values:
            return values[node]
        name = info(node).tensor
        assert name is not None, f"{node} has no value yet"
        tensor = program.entries[name].tensor
        if replace_tensor is not None:
            tensor = replace_tensor(name, tensor)
        return tensor if dtype is None else _convert(tensor, dtype)

    def fetch_as_it_is(node: fx.Node) -> Any:
        return fetch(node, None)

    for node in program.graph.nodes:
        if node.op == "call_function":
            # Of a table few rows are read: converting those is enough.
            read = fetch_as_it_is if node.target in _LOOK_UPS else fetch
            args, kwargs = fx.map_arg((node.args, node.kwargs), read)
            if dtype is not None:
                args, kwargs = _convert_arguments(args, kwargs, dtype)
            result = node.target(*args, **kwargs)
            # What an op creates has the default dtype unless it was told otherwise.
            values[node] = result if dtype is None else _convert(result, dtype)
            del args, kwargs, result
            if observe is not None:
                observe(node, values[node])
        elif node.op == "output":
            outputs: list[Any] = list(fx.map_arg(node.args[0], fetch))
            return outputs
        for used in dying.get(node, ()):
            values.pop(used, None)
    raise AssertionError("a graph without an output")


def _convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def _convert_arguments(args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Let casts and creations inside the graph follow the dtype of the run."""

    def convert(value: Any) -> Any:
        # One of a byte says how numbers are stored, not what to compute in.
        if isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1:
            return dtype
        return value

    return tuple(map(convert, args)), {k: convert(v) for k, v in kwargs.items()}
