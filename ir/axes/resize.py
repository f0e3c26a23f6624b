"""Recomputing a graph's static integers from terms, after indices were left out."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import Extent, is_static
from torchlathe.ir.axes.inference import AxisMap
from torchlathe.ir.axes.rule import Layout
from torchlathe.ir.axes.terms import Atom, Product, Term

if TYPE_CHECKING:
    from torchlathe.ir.edit import Edit

__all__ = ["Resize"]


def _no_twin(name: str) -> torch.Tensor:
    raise AssertionError(f"no full-size model to take {name} from")


@dataclass
class Resize:
    """Which indices stay, and what rules call to adapt their nodes.

    Attributes:
        axis_map: Terms of the program before anything was left out.
        kept: Per atom number, which of its indices stay; atoms not in here stay whole.
        edit: The edit that the changes go through.
        corrected: Nodes at which exactness needs a correction.
        twin: The tensors, by name, of the full-size model that has zeros where this one was cut.
    """

    axis_map: AxisMap
    kept: Mapping[int, torch.Tensor]
    edit: Edit
    corrected: frozenset[fx.Node] = frozenset()
    twin: Callable[[str], torch.Tensor] = _no_twin
    _masks: dict[int, torch.Tensor | None] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _indices: dict[int, torch.Tensor | None] = field(default_factory=dict)
    # The caches above are keyed by id(term), so the terms must stay alive as long as they do.
    _alive: list[Term] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count what is kept once, since extents are asked for at every node."""
        self._counts = {number: int(mask.sum()) for number, mask in self.kept.items()}

    def mask(self, term: Term) -> torch.Tensor | None:
        """Which indices of an axis stay, shape (extent,) bool; None for all of them."""
        key = id(term)
        if key not in self._masks:
            self._alive.append(term)
            self._masks[key] = self._mask(self.axis_map.resolve(term))
        return self._masks[key]

    def indices(self, term: Term) -> torch.Tensor | None:
        """The indices of an axis that stay, shape (kept,) int64; None for all of them."""
        key = id(term)
        if key not in self._indices:
            mask = self.mask(term)  # this also keeps the term alive
            self._indices[key] = None if mask is None else mask.nonzero().flatten()
        return self._indices[key]

    def _mask(self, term: Term) -> torch.Tensor | None:
        if isinstance(term, Atom):
            return self.kept.get(term.number)
        parts = term.factors if isinstance(term, Product) else term.pieces
        masks = [self.mask(part) for part in parts]
        if all(mask is None for mask in masks):
            return None
        full = [
            torch.ones(part.extent, dtype=torch.bool) if mask is None else mask
            for part, mask in zip(parts, masks, strict=True)
            if mask is not None or is_static(part.extent)
        ]
        if len(full) != len(parts):
            raise AssertionError("an erased atom shares an axis with a dynamic one")
        if not isinstance(term, Product):
            return torch.cat(full)
        result = full[0]
        for mask in full[1:]:
            result = (result[:, None] & mask[None, :]).flatten()
        return result

    def touched(self, term: Term) -> bool:
        """Whether any atom of a term loses indices."""
        return any(a.number in self.kept for a in self.axis_map.atoms_of(term))

    def extent(self, term: Term) -> Extent:
        """The new extent of a term."""
        term = self.axis_map.resolve(term)
        if isinstance(term, Atom):
            count = self._counts.get(term.number)
            return term.extent if count is None else count
        if isinstance(term, Product):
            result: Extent = 1
            for factor in term.factors:
                result = result * self.extent(factor)
            return result
        return sum((self.extent(piece) for piece in term.pieces), 0)

    def share(self, term: Term) -> float:
        """New extent over old extent of a term (dynamic factors cancel)."""
        return float(self._static(term, new=True) / self._static(term, new=False))

    def _static(self, term: Term, *, new: bool) -> int:
        """The product of the static factors of a term."""
        term = self.axis_map.resolve(term)
        factors = term.factors if isinstance(term, Product) else (term,)
        result = 1
        for factor in factors:
            if is_static(factor.extent):
                result *= self.extent(factor) if new else factor.extent
        return result

    def position(self, term: Term, index: int) -> int:
        """Where a boundary at ``index`` of the old axis lies in the new one."""
        mask = self.mask(term)
        return index if mask is None else int(mask[:index].sum())

    def size(self, node: fx.Node, arg: Any, term: Term) -> Any:
        """A size argument that stands for the whole axis of this term, recomputed.

        Args:
            node: The node that has the argument.
            arg: An int, -1, or a node with a SymInt.
            term: The axis that it sizes.
        """
        if not self.touched(term):
            return arg
        if isinstance(arg, int):
            return arg if arg == -1 else self.extent(term)
        if not isinstance(arg, fx.Node):
            return arg
        old, new = self._static(term, new=False), self._static(term, new=True)
        edit = self.edit
        dynamic = edit.call(operator.floordiv, (arg, old), like=node, before=node)
        return edit.call(operator.mul, (dynamic, new), like=node, before=node)

    def sizes(self, node: fx.Node, args: Any, terms: tuple[Term, ...]) -> list[Any]:
        """Several size arguments, one per axis."""
        return [self.size(node, arg, term) for arg, term in zip(args, terms, strict=True)]

    def terms(self, node: fx.Node) -> tuple[Term, ...]:
        """Terms of a node before anything was left out.

        For a replacement these are the terms of what it took the place of; other nodes made
        since have none.
        """
        return self.axis_map.terms(self.edit.stands_for.get(node, node))

    def shapes(self, node: fx.Node) -> list[list[Any]]:
        """New shapes of a node's results: static extents from the terms, others as they are."""
        value = node.meta["val"]
        values = value if isinstance(value, list | tuple) else [value]
        found = []
        for item, terms in zip(values, self.axis_map.results(node), strict=True):
            if isinstance(item, torch.Tensor):
                found.append(
                    [
                        self._dim(dim, term)
                        for dim, term in zip(item.shape, terms or (), strict=True)
                    ]
                )
        return found

    def _dim(self, dim: Any, term: Term) -> Any:
        if not self.touched(term):
            return dim
        if isinstance(dim, int):
            return self.extent(term)
        old, new = self._static(term, new=False), self._static(term, new=True)
        return dim // old * new

    def layout(self, node: fx.Node) -> Layout:
        """The letters of a contraction."""
        return self.axis_map.layouts[node]
