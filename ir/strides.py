"""Strides of results that have gaps, from runs on meta tensors of sample sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from torchlathe.ir.extents import expression

__all__ = ["StrideSampler"]

# Symbols get multiples of a number with many divisors, since what is cut or folded by 2 or 3 was
# checked to divide when the model was captured.
_BASES = (5040, 7 * 5040)


class StrideSampler:
    """Finds the strides that a node's results have, where these depend on no symbol.

    A slice keeps the strides of what it is cut from, an expanded axis has none; neither follows
    from shapes. Running the op on fake tensors with symbolic sizes tells, but takes a millisecond;
    on meta tensors with sizes that are numbers it takes microseconds. What comes out the same
    for two choices of the symbols depends on none of them.
    """

    def __init__(self) -> None:
        self._symbols: dict[sympy.Symbol, int] = {}
        self._numbers: dict[tuple[Any, int], int] = {}

    def strides(
        self, node: fx.Node, shapes: Sequence[Sequence[Any]]
    ) -> list[tuple[int, ...]] | None:
        """Strides of each tensor that a node gives.

        Args:
            node: A call whose inputs have their fake values.
            shapes: What is known of the results: their extents, symbolic ones among them.

        Returns:
            Per tensor; None where they depend on symbols, or the op does not run on meta tensors.
        """
        found: list[tuple[int, ...]] | None = None
        for sample in range(len(_BASES)):
            try:
                tensors = self._run(node, sample)
                wanted = [tuple(self._number(d, sample) for d in shape) for shape in shapes]
            except Exception:  # an op raises what it likes; the slow way tells what is wrong
                return None
            if [tuple(t.shape) for t in tensors] != wanted:
                return None
            strides = [tuple(t.stride()) for t in tensors]
            if found is not None and found != strides:
                return None
            found = strides
        return found

    def _run(self, node: fx.Node, sample: int) -> list[torch.Tensor]:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda n: self._stand_in(n.meta["val"], sample)
        )
        assert callable(node.target)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        results = result if isinstance(result, list | tuple) else [result]
        return [item for item in results if isinstance(item, torch.Tensor)]

    def _stand_in(self, value: Any, sample: int) -> Any:
        if isinstance(value, torch.Tensor):
            sizes = [self._number(d, sample) for d in value.shape]
            strides = [self._number(d, sample) for d in value.stride()]
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
        if isinstance(value, list | tuple):
            return type(value)(self._stand_in(item, sample) for item in value)
        return self._number(value, sample) if isinstance(value, torch.SymInt) else value

    def _number(self, extent: Any, sample: int) -> int:
        extent = expression(extent)
        if isinstance(extent, int):
            return extent
        key = (extent, sample)
        if key not in self._numbers:
            chosen = {s: _BASES[sample] * self._index(s) for s in extent.free_symbols}
            self._numbers[key] = int(extent.xreplace(chosen))
        return self._numbers[key]

    def _index(self, symbol: sympy.Symbol) -> int:
        return self._symbols.setdefault(symbol, len(self._symbols) + 1)
