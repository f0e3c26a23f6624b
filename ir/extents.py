"""Symbolic extents: reading them without adding guards, naming them, and giving them values.

``SymInt`` arithmetic and comparisons leave guards in the shape environment of the capture. What
only looks at a program works on the sympy expressions instead; plain integers stay integers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir.errors import InputError

if TYPE_CHECKING:
    import sympy

    from torchlathe.ir.program import Program

__all__ = [
    "Extent",
    "as_int",
    "canonical_symbols",
    "example_sizes",
    "expression",
    "symbol_names",
]

Extent: TypeAlias = "int | sympy.Expr"


def expression(extent: Any) -> Any:
    """The sympy expression of a symbolic number; anything else as it is."""
    if not isinstance(extent, torch.SymInt | torch.SymFloat | torch.SymBool):
        return extent
    found = extent.node.expr
    return int(found) if found.is_Integer else found


def symbol_names(program: Program) -> dict[sympy.Symbol, str]:
    """Name each symbol of a program: s0, s1, … by first appearance (u0, … where data decides).

    The names that the shape environment uses depend on what was traced before; these do not.
    """
    names: dict[sympy.Symbol, str] = {}
    counts = {"s": 0, "u": 0}
    for node in program.graph.nodes:
        for number in _numbers(node.meta.get("val")):
            found = expression(number)
            free = getattr(found, "free_symbols", ())
            for symbol in sorted(free, key=_natural):
                if symbol not in names:
                    prefix = "u" if symbol.name.startswith(("u", "zu")) else "s"
                    names[symbol] = f"{prefix}{counts[prefix]}"
                    counts[prefix] += 1
    return names


def canonical_symbols(names: Mapping[sympy.Symbol, str]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbols of these names for those of the shape environment, to put in their place."""
    if not names:
        return {}
    import sympy

    return {old: sympy.Symbol(name, **old.assumptions0) for old, name in names.items()}


def example_sizes(
    program: Program, inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None
) -> dict[sympy.Symbol, int]:
    """Value of each symbol that the shapes of the inputs decide.

    Args:
        program: The program.
        inputs: ``(args, kwargs)``; by default the example inputs of the capture.
    """
    args, kwargs = program.example_inputs if inputs is None else inputs
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    sizes: dict[sympy.Symbol, int] = {}
    derived: list[tuple[Any, int]] = []
    for node, leaf in zip(program.input_nodes, leaves, strict=False):
        for want, got in zip(_numbers(node.meta.get("val")), _numbers(leaf), strict=False):
            found = expression(want)
            if isinstance(found, int | float | bool) or not isinstance(got, int):
                continue
            if found.is_symbol:
                sizes.setdefault(found, got)
            else:
                derived.append((found, got))
        # A view of a larger tensor may have a stride that is a size of nothing else.
        for want, got in zip(_strides(node.meta.get("val")), _strides(leaf), strict=False):
            found = expression(want)
            if not isinstance(found, int | float | bool) and found.is_symbol:
                sizes.setdefault(found, int(got))
    for found, got in derived:
        sizes.update(_solve(found.subs(sizes), got))
    return sizes


def as_int(extent: Extent, sizes: Mapping[sympy.Symbol, int]) -> int:
    """The value of an extent.

    Raises:
        InputError: A symbol of it has no size here.
    """
    if isinstance(extent, int):
        return extent
    import sympy

    value = extent.xreplace({symbol: sympy.Integer(size) for symbol, size in sizes.items()})
    if not value.is_number:
        missing = ", ".join(sorted(s.name for s in value.free_symbols))
        raise InputError(
            f"the size {missing} is not decided by the shapes of the inputs",
            hint="it depends on the data; give a value for it",
        )
    return int(value)


def _numbers(value: Any) -> Iterator[Any]:
    """The extents of a tensor or of several, or the number itself."""
    if isinstance(value, torch.Tensor):
        yield from value.shape
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif value is not None:
        yield value


def _strides(value: Any) -> Iterator[Any]:
    """The strides of a tensor or of several."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        yield from value.stride()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strides(item)


def _solve(found: sympy.Expr, got: int) -> dict[sympy.Symbol, int]:
    """Solve an extent like ``2*s0 + 1`` for its one symbol; nothing if that is not possible."""
    free: Iterable[sympy.Symbol] = found.free_symbols
    if len(symbols := list(free)) != 1:
        return {}
    import sympy

    try:
        solutions = sympy.solve(found - got, symbols[0])
    except NotImplementedError:
        return {}
    if not solutions or not solutions[0].is_Integer:
        return {}
    return {symbols[0]: int(solutions[0])}


def _natural(symbol: sympy.Symbol) -> tuple[str, int]:
    digits = re.search(r"\d+$", symbol.name)
    return symbol.name.rstrip("0123456789"), int(digits.group()) if digits else -1
