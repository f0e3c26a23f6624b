"""Flattening and checking the arguments of a call against what was captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir.errors import InputError

if TYPE_CHECKING:
    from torch import fx

    from torchlathe.ir.program import Program

__all__ = ["flatten_inputs", "input_paths"]


def input_paths(program: Program) -> list[str]:
    """Name of each flat input as a caller would write it, in the order of ``input_nodes``."""
    args, kwargs = program.example_inputs
    leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    names = []
    for path, _ in leaves:
        keyword = getattr(path[0], "idx", 0) == 1
        text = pytree.keystr(tuple(path[1:]))
        if keyword and text.startswith("['"):
            first, rest = text[2:].split("']", 1)
            text = first + rest
        else:
            text = "args" + text
        names.append(text)
    return names


def flatten_inputs(program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flatten call arguments, and hold them against the captured structure.

    Raises:
        InputError: Another structure, dtype, rank or static extent than was captured, or a
            changed non-tensor argument.
    """
    expected = program.in_spec
    # Keywords may come in any order; the spec has the order of the capture.
    want = list(program.example_inputs[1])
    if set(want) == set(kwargs):
        kwargs = {name: kwargs[name] for name in want}
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec != expected:
        raise InputError(
            f"called with {_call_text(args, kwargs)}, but captured with "
            f"{_call_text(*program.example_inputs)}",
            hint="pass arguments in the structure (and the same way, by position or by name) "
            "that example_inputs and example_kwargs had",
        )
    nodes = program.input_nodes
    if len(nodes) != len(leaves):
        raise InputError(f"{len(leaves)} flat inputs given, {len(nodes)} expected")
    symbols: dict[Any, int] = {}
    for index, (node, leaf) in enumerate(zip(nodes, leaves, strict=True)):
        _check_leaf(program, index, node, leaf, symbols)
    return leaves


def _check_leaf(
    program: Program, index: int, node: fx.Node, leaf: Any, symbols: dict[Any, int]
) -> None:
    value = node.meta.get("val")

    def fail(message: str, hint: str) -> InputError:
        return InputError(f"input {input_paths(program)[index]}: {message}", hint=hint)

    if not isinstance(value, torch.Tensor):
        if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) and value != leaf:
            raise fail(
                f"the graph was captured with the constant {value!r}, not {leaf!r}",
                "capture again with the other value: it decides which graph is traced",
            )
        return
    if not isinstance(leaf, torch.Tensor):
        raise fail(f"expected a tensor, got {type(leaf).__name__}", "pass a tensor")
    if leaf.dtype != value.dtype:
        raise fail(f"expected {value.dtype}, got {leaf.dtype}", f"convert with .to({value.dtype})")
    if leaf.dim() != value.dim():
        raise fail(
            f"expected {value.dim()} dimensions {_shape(value)}, got {tuple(leaf.shape)}",
            "give the shape that the example inputs had",
        )
    for axis, (want, got) in enumerate(zip(value.shape, leaf.shape, strict=True)):
        if isinstance(want, int):
            if want != got:
                raise fail(
                    f"dimension {axis} is static with extent {want}, got {got}",
                    "mark it dynamic: dynamic_shapes= as torch.export takes it",
                )
            continue
        symbol = want.node.expr
        if not symbol.is_symbol:
            continue
        if symbols.setdefault(symbol, got) != got:
            raise fail(
                f"dimension {axis} is {got}, but {symbol} is {symbols[symbol]} elsewhere",
                "inputs that share this dimension must have the same extent there",
            )
        limits = program.range_constraints.get(symbol)
        if limits is not None and not (limits.lower <= got <= limits.upper):
            raise fail(
                f"dimension {axis} must be in [{limits.lower}, {limits.upper}], got {got}",
                "capture again with a wider range",
            )


def _shape(value: torch.Tensor) -> str:
    return "(" + ", ".join(str(d) for d in value.shape) + ")"


def _call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [type(a).__name__ for a in args]
    parts += [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
    return "(" + ", ".join(parts) + ")"
