"""Hidden units of experts in one order, so that means of their weights make sense.

For a permutation p of the hidden units of one expert, ``down[:, p] act(up[p] x)`` is what it was:
experts that compute the same may have their units in any order. A gated expert has one order for
the rows of its gate, the rows of its up projection and the columns of its down projection.

Source: permutation alignment of MC-SMoE (arXiv 2310.01334, section 3.2; weight matching of
arXiv 2209.04836). Which slices belong to a unit is read off the axis terms (own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchlathe.ir import Program
from torchlathe.ir.axes import AxisTerms
from torchlathe.passes.analysis.experts import ExpertLayer
from torchlathe.passes.analysis.gauge import balanced_scales, match_units
from torchlathe.passes.rewrite.erasing.units import unit_indices
from torchlathe.passes.rewrite.experts.balancing import (
    Slot,
    reading_tensors,
    scalable_slots,
)

__all__ = ["Alignment", "Expert", "expert_of", "units_of"]

# The tensors of one expert by name, without the axis of experts.
Expert = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class UnitSlices:
    """Where the units of one atom lie in the tensors of an expert.

    Attributes:
        places: Per tensor its axis (of the expert's slice), and per unit the indices that it owns;
            shape (units, indices) int64.
        readers: The tensors that read the units; the others write them.
        scaled: Slices that may be scaled if the readers take it back; empty if there are none, or
            if scales are to stay.
    """

    places: tuple[tuple[str, int, torch.Tensor], ...]
    readers: frozenset[str] = frozenset()
    scaled: frozenset[Slot] = frozenset()

    def rows(self, expert: Expert) -> list[torch.Tensor]:
        """What each unit owns, tensor by tensor; units on axis 0."""
        return [
            expert[name].movedim(axis, 0)[indices].flatten(1) for name, axis, indices in self.places
        ]

    def permuted(self, expert: Expert, order: torch.Tensor) -> Expert:
        """The expert with its units in another order."""
        found = dict(expert)
        for name, axis, indices in self.places:
            moved = found[name].movedim(axis, 0).clone()
            order_here = order.to(moved.device)
            moved[indices] = moved[indices[order_here]]
            found[name] = moved.movedim(0, axis)
        return found

    def balanced(self, expert: Expert) -> Expert:
        """The expert with what writes a unit as large as what reads it, where that is free."""
        if not self.scaled:
            return expert
        rows = {
            (name, copy): expert[name].movedim(axis, 0)[indices[:, copy]]
            for name, axis, indices in self.places
            for copy in range(indices.shape[1])
        }
        reading = [slot for slot in rows if slot[0] in self.readers]
        scales = balanced_scales(
            [rows[slot] for slot in sorted(self.scaled)], [rows[slot] for slot in reading]
        )
        found = dict(expert)
        for name, axis, indices in self.places:
            moved = found[name].movedim(axis, 0).clone()
            shape = (-1, *(1 for _ in moved.shape[1:]))
            for copy in range(indices.shape[1]):
                factor = 1 / scales if name in self.readers else scales
                if name in self.readers or (name, copy) in self.scaled:
                    scaled = moved[indices[:, copy]].double() * factor.reshape(shape)
                    moved[indices[:, copy]] = scaled.to(moved.dtype)
            found[name] = moved.movedim(0, axis)
        return found


@dataclass(frozen=True)
class Alignment:
    """Brings experts of a layer to the order of units that another one has.

    Attributes:
        units: Per atom the slices of its units.
    """

    units: tuple[UnitSlices, ...]

    def balanced(self, expert: Expert) -> Expert:
        """The same expert with one scale for each unit where it has a choice of them."""
        for slices in self.units:
            expert = slices.balanced(expert)
        return expert

    def align(self, reference: Expert, other: Expert) -> Expert:
        """The same expert with units in the order of those of the reference that they are most
        like; both have their units listed by the same tensors.
        """
        for slices in self.units:
            order = match_units(slices.rows(reference), slices.rows(other))
            other = slices.permuted(other, order)
        return other


def units_of(program: Program, layer: ExpertLayer, *, balance: bool) -> Alignment:
    """Which units the experts of a layer have, by the axis terms.

    Args:
        program: Of the layer.
        layer: Whose experts.
        balance: Whether `Alignment.balanced` changes scales where it can.
    """
    axis_map = program.analysis(AxisTerms)
    nodes = program.tensor_nodes
    found = []
    for hidden in layer.hidden:
        places = []
        for name, axis in hidden.places:
            owner = unit_indices(axis_map.terms(nodes[name])[axis], hidden.atom.number)
            order = owner.sort(stable=True).indices[int((owner < 0).sum()) :]
            indices = order.reshape(int(hidden.atom.extent), -1)
            places.append((name, axis - (axis > layer.tensors[name]), indices))
        readers = reading_tensors(axis_map, layer, hidden)
        scaled = scalable_slots(program, layer, hidden, readers) if balance else None
        found.append(UnitSlices(tuple(places), readers, scaled or frozenset()))
    return Alignment(tuple(found))


def expert_of(program: Program, layer: ExpertLayer, number: int) -> dict[str, torch.Tensor]:
    """The tensors of one expert, by name."""
    return {
        name: program.tensor(name).detach().select(axis, number)
        for name, axis in layer.tensors.items()
    }
