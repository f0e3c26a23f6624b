"""What a program would cost with fewer units, from extents alone: nothing is erased to find out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind, info
from torchlathe.ir.axes import Atom, AxisMap, Concat, Product, Term
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.cost.calls import Call, Value, read_call, value_of
from torchlathe.ir.cost.flops import FLOPS
from torchlathe.ir.extents import as_int, example_sizes
from torchlathe.passes.analysis.families import Families, Family

__all__ = ["Sizes"]

Kept = Mapping[int, int]
Weight = Literal["prunable", "parameter", "itemsize"]  # fields of _Tensor
# What is counted per element, the chosen atoms, and the concatenated terms of some tensors.
_Group = tuple[int, tuple[int, ...], tuple[Term, ...]]


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the program: its axes, the bytes of an element, and what it counts as."""

    axes: tuple[Term, ...]
    itemsize: int
    parameter: bool
    prunable: bool


@dataclass(frozen=True)
class _Bias:
    """A bias that folding adds, as soon as one of these atoms loses a unit."""

    axis: Term
    itemsize: int
    atoms: Mapping[int, int]


class Sizes:
    """Parameters, bytes and FLOPs of a program in which some atoms keep fewer units.

    The methods take the units left by atom number; atoms that are not in there stay whole.

    Args:
        program: As it is now.
        families: Its families.
        chosen: Those that may lose units.
    """

    def __init__(self, program: Program, families: Families, chosen: tuple[Family, ...]) -> None:
        self.program = program
        self.axis_map: AxisMap = families.axis_map
        self._families = families
        self._chosen = chosen
        self._sums: dict[Weight, list[_Group]] = {}
        nodes = program.tensor_nodes
        owned = {s.name for f in chosen for s in f.slices}
        self._tensors = [
            _Tensor(
                self.axis_map.terms(nodes[name]),
                entry.tensor.element_size(),
                entry.kind is TensorKind.PARAMETER,
                entry.kind is TensorKind.PARAMETER and name in owned,
            )
            for name, entry in program.entries.items()
            if name in owned and entry.kind is not TensorKind.CONSTANT
        ]
        self.prunable = self.remaining({})

    def remaining(self, kept: Kept) -> int:
        """Parameters left of those that a chosen family owns slices of."""
        return self._count(kept, "prunable")

    def parameters(self, kept: Kept) -> int:
        """Parameters of the whole program."""
        added = sum(count for count, _ in self._added(kept))
        whole = self.program.cost().parameters
        return whole - self._owned[0] + self._count(kept, "parameter") + added

    def bytes(self, kept: Kept) -> int:
        """Bytes of the parameters and buffers of the whole program."""
        added = sum(count * itemsize for count, itemsize in self._added(kept))
        whole = self.program.cost().bytes
        return whole - self._owned[1] + self._count(kept, "itemsize") + added

    def flops(self, kept: Kept) -> int:
        """FLOPs of the whole program at the sizes of the example inputs.

        Raises:
            InputError: A size depends on data.
        """
        extent = self._extents(kept)
        return self._fixed_flops + sum(count(extent) for count in self._contractions.values())

    def saved(self, family: Family) -> dict[str, int]:
        """Parameters, bytes and FLOPs that the first unit of a chosen family saves.

        Only what the family touches is counted, so that asking for all takes linear time.
        """
        number = family.atom.number
        now, less = self._extents({}), self._extents({number: family.extent - 1})
        params = size = flops = 0
        for tensor in self._tensors_on.get(number, ()):
            gone = math.prod(map(now, tensor.axes)) - math.prod(map(less, tensor.axes))
            params += gone * tensor.parameter
            size += gone * tensor.itemsize
        for node in self._families.index.touching[number]:
            if (count := self._contractions.get(node)) is not None:
                flops += count(now) - count(less)
        return {"params": params, "bytes": size, "flops": flops}

    # -- extents -----------------------------------------------------------------------------

    def _extents(self, kept: Kept) -> Callable[[Term], int]:
        cache: dict[int, int] = {}
        sizes = self._symbols

        def extent(term: Term) -> int:
            known = cache.get(id(term))
            if known is None:
                if isinstance(term, Product):
                    known = math.prod(extent(f) for f in term.factors)
                elif isinstance(term, Concat):
                    known = sum(extent(p) for p in term.pieces)
                else:
                    known = kept.get(term.number)
                    if known is None:
                        known = as_int(term.extent, sizes)
                cache[id(term)] = known
            return known

        return extent

    @cached_property
    def _symbols(self) -> Mapping[Any, int]:
        return example_sizes(self.program)

    # -- tensors -----------------------------------------------------------------------------

    @cached_property
    def _tensors_on(self) -> dict[int, list[_Tensor]]:
        """The tensors that have an atom on an axis, by its number."""
        found: dict[int, list[_Tensor]] = {}
        for tensor in self._tensors:
            atoms = {a.number for term in tensor.axes for a in self.axis_map.atoms_of(term)}
            for number in atoms:
                found.setdefault(number, []).append(tensor)
        return found

    def _count(self, kept: Kept, weight: Weight) -> int:
        """Sum of a weight per element over the tensors that are counted by their axes."""
        if weight not in self._sums:
            self._sums[weight] = self._sum(weight)
        extent = self._extents(kept)
        chosen = self._extent_of
        return sum(
            each
            * math.prod(kept.get(number, chosen[number]) for number in numbers)
            * math.prod(map(extent, pieced))
            for each, numbers, pieced in self._sums[weight]
        )

    def _sum(self, weight: Weight) -> list[_Group]:
        """Tensors with the same chosen atoms taken together: there are far fewer of these."""
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        terms: dict[int, Term] = {}
        whole = self._extents({})
        for tensor in self._tensors:
            each = int(getattr(tensor, weight))
            numbers: list[int] = []
            pieced: list[int] = []
            for factor in (f for term in tensor.axes for f in _factors(term)):
                if isinstance(factor, Concat):
                    terms[id(factor)] = factor
                    pieced.append(id(factor))
                elif factor.number in self._extent_of:
                    numbers.append(factor.number)
                else:
                    each *= whole(factor)
            if each:
                key = (tuple(sorted(numbers)), tuple(pieced))
                found[key] = found.get(key, 0) + each
        return [
            (each, numbers, tuple(terms[i] for i in pieced))
            for (numbers, pieced), each in found.items()
        ]

    @cached_property
    def _extent_of(self) -> dict[int, int]:
        """Units of the chosen families now, by atom number."""
        return {f.atom.number: f.extent for f in self._chosen}

    @cached_property
    def _owned(self) -> tuple[int, int]:
        """Parameters and bytes of the tensors that are counted by their axes."""
        return self._count({}, "parameter"), self._count({}, "itemsize")

    def _added(self, kept: Kept) -> list[tuple[int, int]]:
        """Elements, and bytes of an element, of each bias that folding adds."""
        extent = self._extents(kept)
        return [
            (extent(bias.axis), bias.itemsize)
            for bias in self._biases
            if any(kept.get(number, full) < full for number, full in bias.atoms.items())
        ]

    @cached_property
    def _biases(self) -> list[_Bias]:
        atoms: dict[fx.Node, dict[int, int]] = {}
        for family in self._chosen:
            for node in family.folds:
                atoms.setdefault(node, {})[family.atom.number] = family.extent
        return [bias for node, held in atoms.items() if (bias := self._bias(node, held))]

    def _bias(self, node: fx.Node, atoms: Mapping[int, int]) -> _Bias | None:
        """The bias that folding adds to this node, if it cannot use one that is there."""
        layout = self.axis_map.layouts.get(node)
        bias = argument(node, "bias")
        own_bias = isinstance(bias, fx.Node) and info(bias).tensor and len(bias.users) == 1
        if layout is None or len(layout.factors) < 2 or own_bias:
            return None
        own = {letter for axis in layout.factors[1][1] for letter in axis}
        data = {letter for axis in layout.factors[0][1] for letter in axis}
        places = [i for i, axis in enumerate(layout.output) if set(axis) & (own - data)]
        weight = info(layout.factors[1][0]).tensor
        if not places or weight is None:
            return None
        term = self.axis_map.terms(node)[places[0]]
        return _Bias(term, self.program.entries[weight].tensor.element_size(), atoms)

    # -- FLOPs -------------------------------------------------------------------------------

    @cached_property
    def _contractions(self) -> dict[fx.Node, Callable[[Callable[[Term], int]], int]]:
        """A function of the extents for each contraction that can shrink."""
        index = self._families.index
        touched = {node for f in self._chosen for node in index.touching[f.atom.number]}
        return {
            node: self._flops_of(node)
            for node in self.program.graph.nodes
            if node.op == "call_function" and node in touched and _formula(node) is not None
        }

    @cached_property
    def _fixed_flops(self) -> int:
        """FLOPs of all other nodes."""
        now = self._extents({})
        total = self.program.cost().flops_at()
        return total - sum(count(now) for count in self._contractions.values())

    def _flops_of(self, node: fx.Node) -> Callable[[Callable[[Term], int]], int]:
        formula = _formula(node)
        assert formula is not None
        used = [*node.all_input_nodes, node]

        def count(extent: Callable[[Term], int]) -> int:
            values = {item: self._value(item, extent) for item in used}
            return as_int(formula(read_call(node, values)), self._symbols)

        return count

    def _value(self, node: fx.Node, extent: Callable[[Term], int]) -> Any:
        """What the FLOP formulas see of a node's value, with other extents."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return Value(tuple(map(extent, self.axis_map.terms(node))), value.dtype, ())
        if isinstance(value, list | tuple):
            results = zip(value, self.axis_map.results(node), strict=False)
            return tuple(
                Value(tuple(map(extent, terms or ())), item.dtype, ())
                if isinstance(item, torch.Tensor)
                else value_of(item)
                for item, terms in results
            )
        return value_of(value)


def _factors(term: Term) -> Sequence[Atom | Concat]:
    # A resolved product is flat.
    return term.factors if isinstance(term, Product) else (term,)  # type: ignore[return-value]


def _formula(node: fx.Node) -> Callable[[Call], Any] | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    return FLOPS.get(node.target._schema.name)
