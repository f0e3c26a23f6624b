"""Arithmetic on extents, which are ints, or sympy expressions where a dimension is dynamic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torchlathe.ir.extents import Extent

__all__ = ["Extent", "divide", "is_static", "multiply", "same", "subtract"]


def is_static(extent: Any) -> bool:
    """Whether the extent is a plain number."""
    return isinstance(extent, int)


def same(a: Any, b: Any) -> bool:
    """Whether two extents are equal for every value of the symbols."""
    if a is b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b) or subtract(a, b) == 0


def subtract(a: Any, b: Any) -> Extent:
    """``a - b``, an int where it is a number."""
    difference = a - b
    if isinstance(difference, int):
        return difference
    difference = difference.expand()
    return int(difference) if difference.is_Integer else difference


def multiply(extents: Iterable[Any]) -> Any:
    """The product; 1 for none."""
    result: Any = 1
    for extent in extents:
        result = result * extent
    return result


def divide(a: Any, b: Any) -> Any:
    """``a / b`` where ``b`` divides ``a`` for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if same(a, b):
        return 1
    if same(b, 0):
        return None
    import sympy

    if isinstance(b, int):
        # By far the most common case, and cancelling polynomials takes milliseconds.
        count, rest = sympy.sympify(a).as_coeff_Mul()
        if not rest.is_Add:
            return rest * (count / b) if count.is_Integer and count % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / b)
    if quotient.is_Integer:
        return int(quotient)
    _, denominator = quotient.as_numer_denom()
    return quotient if denominator == 1 else None
