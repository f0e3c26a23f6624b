"""Flattening and checking the arguments of a call against what was captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir.errors import InputError
from torchlathe.ir.extents import as_int, canonical_symbols, symbol_names

if TYPE_CHECKING:
    from torch import fx

    from torchlathe.ir.program import Program

__all__ = ["flatten_inputs", "input_paths", "same_input_types"]


def same_input_types(a: Program, b: Program) -> bool:
    """Whether two programs take tensors of the same dtypes, so that one's inputs fit the other."""
    pairs = zip(a.input_nodes, b.input_nodes, strict=True)
    return all(_dtype(first) == _dtype(second) for first, second in pairs)


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


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
    given: tuple[tuple[Any, ...], dict[str, Any]] = (tuple(args), dict(kwargs))
    leaves, spec = pytree.tree_flatten(given)
    if spec != expected:
        # The keys of dictionaries, and keywords, may come in any order.
        leaves, spec = pytree.tree_flatten(_in_order(given, expected))
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


def _in_order(value: Any, spec: pytree.TreeSpec) -> Any:
    """Bring the keys of the dictionaries in a value into the order of a spec."""
    if spec.is_leaf():
        return value
    parts = spec.children()
    if type(value) is dict and spec.type is dict and value.keys() == set(spec.context):
        return {
            key: _in_order(value[key], part) for key, part in zip(spec.context, parts, strict=True)
        }
    if type(value) in (tuple, list) and len(value) == len(parts):
        return type(value)(_in_order(item, part) for item, part in zip(value, parts, strict=True))
    return value


def _check_leaf(
    program: Program, index: int, node: fx.Node, leaf: Any, symbols: dict[Any, int]
) -> None:
    value = node.meta.get("val")

    def fail(message: str, hint: str) -> InputError:
        return InputError(f"input {input_paths(program)[index]}: {message}", hint=hint)

    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return
    if not isinstance(value, torch.Tensor):
        if type(value) is not type(leaf) or value != leaf:
            raise fail(
                f"the graph was captured with the constant {value!r}, not {_brief(leaf)}",
                "capture again with the other value: it decides which graph is traced",
            )
        return
    if not isinstance(leaf, torch.Tensor):
        raise fail(f"expected a tensor, got {_brief(leaf)}", "pass a tensor")
    if leaf.dtype != value.dtype:
        raise fail(f"expected {value.dtype}, got {leaf.dtype}", f"convert with .to({value.dtype})")
    if leaf.dim() != value.dim():
        raise fail(
            f"expected {value.dim()} dimensions {_shape(program, value)}, got {tuple(leaf.shape)}",
            "give the shape that the example inputs had",
        )
    for axis, (want, got) in enumerate(zip(value.shape, leaf.shape, strict=True)):
        if isinstance(want, int):
            if want != got:
                raise fail(
                    f"dimension {axis} is static with extent {want}, got {got}",
                    f"give {_shape(program, value)}, or capture with this dimension dynamic: "
                    "dynamic_shapes= as torch.export takes it",
                )
            continue
        problem = _symbolic_mismatch(program, want.node.expr, got, symbols)
        if problem is not None:
            message, hint = problem
            raise fail(f"dimension {axis} {message}", hint)


def _symbolic_mismatch(
    program: Program, extent: Any, got: int, symbols: dict[Any, int]
) -> tuple[str, str] | None:
    """What is wrong with an extent, and what to do; fills in the symbols seen so far."""
    if not extent.is_symbol:
        if not extent.free_symbols <= symbols.keys() or as_int(extent, symbols) == got:
            return None
        name = extent.xreplace(canonical_symbols(symbol_names(program)))
        return (
            f"must be {name} = {as_int(extent, symbols)}, got {got}",
            "the model relates this dimension to those of other inputs",
        )
    if symbols.setdefault(extent, got) != got:
        name = symbol_names(program)[extent]
        return (
            f"is {got}, but {name} is {symbols[extent]} elsewhere",
            "inputs that share this dimension must have the same extent there",
        )
    limits = program.range_constraints.get(extent)
    # A least extent of 2 is what export assumes while it traces, and not a need of the graph:
    # torch takes 0 and 1 at run time, too.
    least = 0 if limits is None or limits.lower <= 2 else limits.lower
    if limits is not None and not (least <= got <= limits.upper):
        return (
            f"must be in [{limits.lower}, {limits.upper}], got {got}",
            "capture again with a wider range",
        )
    return None


def _shape(program: Program, value: torch.Tensor) -> str:
    symbols = canonical_symbols(symbol_names(program))
    parts = (d if isinstance(d, int) else d.node.expr.xreplace(symbols) for d in value.shape)
    return "(" + ", ".join(map(str, parts)) + ")"


def _brief(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return "a tensor"
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return repr(leaf)
    return f"an object of type {type(leaf).__name__}"


def _call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [type(a).__name__ for a in args]
    parts += [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
    return "(" + ", ".join(parts) + ")"
