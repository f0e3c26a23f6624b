"""Arithmetic on extents, which are ints, or sympy expressions where a dimension is dynamic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["Extent", "divide", "extent_of", "is_static", "multiply", "same"]

# An int, or a sympy expression over the symbols of the shape environment.
Extent = Any


def extent_of(dim: Any) -> Extent:
    """The extent of one entry of a fake tensor's shape; adds no guard."""
    if isinstance(dim, int):
        return dim
    assert isinstance(dim, torch.SymInt)
    expr = dim.node.expr
    return int(expr) if expr.is_number else expr


def is_static(extent: Extent) -> bool:
    """Whether the extent is a plain number."""
    return isinstance(extent, int)


def same(a: Extent, b: Extent) -> bool:
    """Whether two extents are equal for every value of the symbols."""
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, int) or isinstance(b, int):
        return False
    return bool(a == b) or (a - b).expand() == 0


def multiply(extents: Iterable[Extent]) -> Extent:
    """The product; 1 for none."""
    result: Extent = 1
    for extent in extents:
        result = result * extent
    return result


def divide(a: Extent, b: Extent) -> Extent | None:
    """``a / b`` where ``b`` divides ``a`` for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if same(a, b):
        return 1
    if same(b, 0):
        return None
    import sympy

    quotient = sympy.cancel(sympy.sympify(a) / b)
    if quotient.is_Integer:
        return int(quotient)
    _, denominator = quotient.as_numer_denom()
    return quotient if denominator == 1 else None
