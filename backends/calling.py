"""The calling convention of the model, checked at each call for a few microseconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import Program

__all__ = ["Convention"]


@dataclass(frozen=True)
class _Leaf:
    """What one flat input must be.

    Attributes:
        index: Position among the flat inputs.
        dtype: Of a tensor; None for another value, which must equal ``constant``.
        static: (axis, extent) of each static dimension.
        symbols: (axis, number of the symbol, least, greatest) of each dimension that is a symbol.
        constant: The value of what is not a tensor.
        quick: Whether this is all that there is to check.
    """

    index: int
    dtype: torch.dtype | None
    rank: int = 0
    static: tuple[tuple[int, int], ...] = ()
    symbols: tuple[tuple[int, int, int, int], ...] = ()
    constant: Any = None
    quick: bool = True


class Convention:
    """Flattens arguments and restores outputs as the program's own methods do, only faster.

    The structure, dtypes and extents that are allowed are worked out once. Whatever does not
    pass is left to ``program.flatten_inputs``, which says what is wrong.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._spec = program.in_spec
        self._keywords = tuple(program.example_inputs[1])
        self._out_spec = program.out_spec
        numbers: dict[Any, int] = {}
        self._leaves = [
            leaf
            for index, node in enumerate(program.input_nodes)
            if (leaf := _leaf(program, index, node.meta.get("val"), numbers)) is not None
        ]
        self._count = len(program.input_nodes)
        # Extents that follow from others, such as 2*s0, are left to the program.
        self._quick = all(leaf.quick for leaf in self._leaves)
        self._symbols = len(numbers)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flatten call arguments to the order of the program's inputs.

        Raises:
            InputError: They do not fit what was captured.
        """
        if kwargs and tuple(kwargs) != self._keywords and set(kwargs) == set(self._keywords):
            kwargs = {name: kwargs[name] for name in self._keywords}
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        # While a graph is captured from this model, comparing extents would add guards.
        if spec == self._spec and (torch.compiler.is_compiling() or self._fits(leaves)):
            return leaves
        return self._program.flatten_inputs(args, kwargs)

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Put flat outputs into the structure that the model returns."""
        return pytree.tree_unflatten(list(outputs), self._out_spec)

    def _fits(self, leaves: list[Any]) -> bool:
        if len(leaves) != self._count or not self._quick:
            return False
        extents: list[int | None] = [None] * self._symbols
        for leaf in self._leaves:
            value = leaves[leaf.index]
            if leaf.dtype is None:
                if type(value) is not type(leaf.constant) or value != leaf.constant:
                    return False
                continue
            if not isinstance(value, torch.Tensor) or value.dtype != leaf.dtype:
                return False
            shape = value.shape
            if len(shape) != leaf.rank or any(shape[axis] != n for axis, n in leaf.static):
                return False
            for axis, number, least, greatest in leaf.symbols:
                extent = shape[axis]
                known = extents[number]
                if (known is not None and known != extent) or not least <= extent <= greatest:
                    return False
                extents[number] = extent
        return True


def _leaf(program: Program, index: int, value: Any, numbers: dict[Any, int]) -> _Leaf | None:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return None
    if not isinstance(value, torch.Tensor):
        return _Leaf(index, None, constant=value)
    quick = True
    static: list[tuple[int, int]] = []
    symbols: list[tuple[int, int, int, int]] = []
    for axis, extent in enumerate(value.shape):
        if isinstance(extent, int):
            static.append((axis, extent))
            continue
        symbol = extent.node.expr
        if not symbol.is_symbol:
            quick = False
            continue
        number = numbers.setdefault(symbol, len(numbers))
        limits = program.range_constraints.get(symbol)
        # See torchlathe.ir.inputs: a least extent of 2 is no need of the graph.
        least = 0 if limits is None or limits.lower <= 2 else _finite(limits.lower, 0)
        greatest = _MOST if limits is None else _finite(limits.upper, _MOST)
        symbols.append((axis, number, least, greatest))
    return _Leaf(index, value.dtype, value.dim(), tuple(static), tuple(symbols), quick=quick)


_MOST = 2**63 - 1


def _finite(limit: Any, otherwise: int) -> int:
    """The end of a range as an int, unless it is an infinity."""
    finite = isinstance(limit, int) or getattr(limit, "is_Integer", False)
    return int(limit) if finite else otherwise
