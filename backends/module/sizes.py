"""What became of each size in the code of a module, told by the axis terms of its graph."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torchlathe.ir import BackendError, Program
from torchlathe.ir.axes import Atom, AxisMap, AxisTerms, Concat, Product, Term
from torchlathe.ir.axes.extents import is_static
from torchlathe.ir.provenance import module_path

__all__ = ["Size", "Sizes"]

# A product of more factors than this has too many parts to be of use to a module's code.
_MOST_FACTORS = 6


@dataclass
class Size:
    """A quantity that the code of a module may hold as an int.

    Attributes:
        old: Its value before.
        new: Its value after.
        roles: How it stands in axes: the whole ``axis``, a ``product`` that is one, the ``outer``,
            ``inner`` or a ``middle`` factor, a ``part`` of several factors, some ``pieces``.
        uses: How often it was met.
    """

    old: int
    new: int
    roles: set[str] = field(default_factory=set)
    uses: int = 0


class Sizes:
    """Sizes of a program before and after passes, by the module whose code they are used in.

    Args:
        before: The program as it was captured from the module.
        after: The program after the passes.

    Raises:
        BackendError: A pass gave a tensor another structure than slices of the one before.
    """

    def __init__(self, before: Program, after: Program) -> None:
        self.before, self.after = before, after
        self.axis_map: AxisMap = before.analysis(AxisTerms)
        self._masks: dict[int, torch.Tensor] = {}
        self.homes: dict[int, str] = {}  # a family's name, by its atom
        self._readers: set[int] = set()  # atoms named after a tensor that only reads them
        self._inner: set[int] = set()  # atoms in the innermost factor of a parameter's axis
        for name, node in before.tensor_nodes.items():
            self._read_tensor(name, node)
        self._own: dict[str, dict[tuple[Any, ...], Size]] = {}
        self._below: dict[str, dict[tuple[Any, ...], Size]] = {}
        self.touched: dict[str, set[int]] = {}
        for node in before.graph.nodes:
            if node.op == "call_function":
                self._read_node(node)

    @property
    def changed(self) -> bool:
        """Whether anything was erased."""
        return bool(self._masks)

    def extent(self, term: Term) -> int:
        """New extent of a static term."""
        term = self.axis_map.resolve(term)
        if isinstance(term, Atom):
            mask = self._masks.get(term.number)
            return int(term.extent) if mask is None else int(mask.sum())
        if isinstance(term, Product):
            return math.prod(map(self.extent, term.factors))
        return sum(map(self.extent, term.pieces))

    def mask(self, term: Term) -> torch.Tensor:
        """Which indices of a static axis stay, shape (extent,) bool."""
        term = self.axis_map.resolve(term)
        if isinstance(term, Atom):
            found = self._masks.get(term.number)
            return torch.ones(int(term.extent), dtype=torch.bool) if found is None else found
        if isinstance(term, Concat):
            return torch.cat([self.mask(piece) for piece in term.pieces])
        result = torch.ones(1, dtype=torch.bool)
        for factor in term.factors:
            result = (result[:, None] & self.mask(factor)[None, :]).flatten()
        return result

    def own(self, path: str) -> list[Size]:
        """Sizes in the code of a module's own forward, in the order in which they appear."""
        return list(self._own.get(path, {}).values())

    def below(self, path: str) -> list[Size]:
        """Sizes in a module and all modules in it."""
        return list(self._below.get(path, {}).values())

    def families(self, path: str) -> list[str]:
        """Names of what was erased in part in a module, or in modules in it.

        Of attention, only dimensions in a head where there are any: whole heads rarely are what
        a class cannot say.
        """
        numbers = self.touched.get(path, set())
        inner = numbers & self._inner
        return [self.homes[n] for n in self.homes if n in (inner or numbers)]

    # -- reading ---------------------------------------------------------------------------

    def _read_tensor(self, name: str, node: fx.Node) -> None:
        after = self.after
        written = {
            atom.number
            for user in node.users
            for result in self.axis_map.results(user)
            for term in result or ()
            for atom in self.axis_map.atoms_of(term)
        }
        entry = after.entries.get(after.aliases.get(name, name))
        if entry is None:
            return
        old = self.before.entries[name].tensor
        if entry.tensor.dim() != old.dim():
            raise BackendError(
                f"{name} has {entry.tensor.dim()} axes and had {old.dim()}: a pass gave it another "
                "structure than the module's code has",
                hint='backend="eager" runs every program',
            )
        for axis, term in enumerate(self.axis_map.terms(node)):
            if entry.tensor.shape[axis] == old.shape[axis]:
                continue
            indices = after.kept.get(name, {}).get(axis)
            if indices is None:
                raise BackendError(f"nothing says which indices of {name}, axis {axis}, stayed")
            earlier = self.before.kept.get(name, {}).get(axis)
            if earlier is not None:
                indices = torch.searchsorted(earlier, indices)
            mask = torch.zeros(old.shape[axis], dtype=torch.bool)
            mask[indices.cpu()] = True
            self._project(self.axis_map.resolve(term), mask, f"{name}:{axis}", written)

    def _project(self, term: Term, mask: torch.Tensor, place: str, written: set[int]) -> None:
        """Find the mask of each atom from that of an axis."""
        if bool(mask.all()):
            return
        if isinstance(term, Atom):
            self._masks[term.number] = mask
            # A family is named after the first tensor that writes it.
            if term.number not in self.homes or term.number in self._readers & written:
                self.homes[term.number] = place
                self._readers.discard(term.number)
                if term.number not in written:
                    self._readers.add(term.number)
        elif isinstance(term, Concat):
            start = 0
            for index, piece in enumerate(term.pieces):
                end = start + int(piece.extent)
                self._project(piece, mask[start:end], f"{place}/{index}", written)
                start = end
        else:
            shaped = mask.reshape([int(f.extent) for f in term.factors])
            for index, factor in enumerate(term.factors):
                others = [i for i in range(shaped.dim()) if i != index]
                part = shaped.any(dim=others) if others else shaped
                self._project(factor, part, f"{place}/{index}", written)
            if len(term.factors) > 1:
                last = self.axis_map.atoms_of(term.factors[-1])
                self._inner.update(a.number for a in last if a.number in self._masks)

    def _read_node(self, node: fx.Node) -> None:
        terms = [t for result in self.axis_map.results(node) for t in result or ()]
        for used in node.all_input_nodes:
            terms += [t for result in self.axis_map.results(used) for t in result or ()]
        innermost = module_path(node)
        paths = {str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
        found: dict[tuple[Any, ...], Size] = {}
        for term in terms:
            for key, size in self._parts(term):
                known = found.setdefault(key, size)
                known.roles |= size.roles
        numbers = {n for n in self._masks for key in found if n in key}
        for path in {*paths, innermost, ""}:
            self._add(self._below.setdefault(path, {}), found)
            self.touched.setdefault(path, set()).update(numbers)
        self._add(self._own.setdefault(innermost, {}), found)

    @staticmethod
    def _add(table: dict[tuple[Any, ...], Size], found: dict[tuple[Any, ...], Size]) -> None:
        for key, size in found.items():
            known = table.setdefault(key, Size(size.old, size.new))
            known.roles |= size.roles
            known.uses += 1

    def _parts(self, term: Term) -> Iterator[tuple[tuple[Any, ...], Size]]:
        """Every size that a term mentions, with what identifies it."""
        term = self.axis_map.resolve(term)
        if isinstance(term, Atom):
            yield from self._sized((term,), "axis")
        elif isinstance(term, Product):
            yield from self._factors(term.factors)
        else:
            count = len(term.pieces)
            for start in range(count):
                yield from self._parts(term.pieces[start])
                for end in range(start + 2, min(count, start + _MOST_FACTORS) + 1):
                    yield from self._sized(term.pieces[start:end], "pieces", add=True)

    def _factors(self, factors: tuple[Term, ...]) -> Iterator[tuple[tuple[Any, ...], Size]]:
        count = len(factors)
        for start in range(count):
            for end in range(start + 1, min(count, start + _MOST_FACTORS) + 1):
                chosen = factors[start:end]
                if len(chosen) == 1:
                    role = "outer" if start == 0 else "inner" if end == count else "middle"
                    if not isinstance(chosen[0], Atom):
                        yield from self._parts(chosen[0])
                else:
                    role = "product" if len(chosen) == count else "part"
                yield from self._sized(chosen, role)

    def _sized(
        self, terms: Iterable[Term], role: str, *, add: bool = False
    ) -> Iterator[tuple[tuple[Any, ...], Size]]:
        terms = tuple(terms)
        if not all(is_static(t.extent) for t in terms):
            return
        count = sum if add else math.prod
        old = int(count(int(t.extent) for t in terms))
        new = int(count(self.extent(t) for t in terms))
        numbers = [a.number for t in terms for a in self.axis_map.atoms_of(t)]
        key = ("+" if add else "*", *numbers)
        if old > 1:
            yield key, Size(old, new, {role})
