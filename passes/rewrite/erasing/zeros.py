"""Units that are zero already: what erasing changes nothing at all.

Not every writer has to be zero. Where the scale and shift of a batch norm are, the channel behind
it is zero whatever the convolution before it computes; where a column of the layer that reads a
unit is zero, nobody sees what the unit holds. So the flow through the graph starts from the slices
that *are* zero, and a unit may go if all that leaves it then is what erasing makes up for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import fx

from torchlathe.ir import InputError, Program
from torchlathe.ir.axes import UNKNOWN, ZERO, Flow
from torchlathe.ir.axes.rule import Value
from torchlathe.passes.analysis.families import Families, Family, ParameterSlice
from torchlathe.passes.rewrite.allocation.ladders import Floors
from torchlathe.passes.rewrite.erasing.units import unit_indices

__all__ = ["zero_units"]

# For each slice of a family, whether it is zero at a unit.
Pattern: TypeAlias = tuple[bool, ...]


def zero_units(
    program: Program, families: Families, chosen: Iterable[Family], floors: Floors
) -> dict[Family, torch.Tensor]:
    """Per family, the units whose erasing leaves every output as it is; shape (units,) int64.

    Raises:
        InputError: NaN in a tensor of a family.
    """
    finder = _Finder(program, families)
    return {family: _within(finder.units(family), family, floors) for family in chosen}


def _within(units: torch.Tensor, family: Family, floors: Floors) -> torch.Tensor:
    """The first of the units, so that what is left is above the floor and a round number."""
    kept = floors.rounded(max(floors.of(family), family.extent - len(units)), family)
    return units[: family.extent - kept]


class _Finder:
    def __init__(self, program: Program, families: Families) -> None:
        self.program, self.families = program, families
        self.nodes = program.tensor_nodes

    def units(self, family: Family) -> torch.Tensor:
        """All units that could go by themselves."""
        zero = torch.stack([self._zero(family, part) for part in family.slices])
        patterns, which = torch.unique(zero, dim=1, return_inverse=True)
        gone = torch.tensor(
            [self._goes(family, tuple(pattern)) for pattern in patterns.T.tolist()],
            dtype=torch.bool,
        )
        return gone[which].nonzero().flatten()

    def _zero(self, family: Family, part: ParameterSlice) -> torch.Tensor:
        """Which units have nothing but zeros in a slice; shape (extent,) bool."""
        tensor = self.program.entries[part.name].tensor.detach()
        if tensor.isnan().any():
            raise InputError(f"{part.name} holds NaN", hint="look for what made it diverge")
        others = [d for d in range(tensor.dim()) if d != part.axis]
        alive = ((tensor != 0).any(dim=others) if others else tensor != 0).cpu()
        term = self.families.axis_map.terms(self.nodes[part.name])[part.axis]
        owner = unit_indices(term, family.atom.number)
        zero = torch.ones(family.extent, dtype=torch.bool)
        zero[owner[alive & (owner >= 0)]] = False
        return zero

    def _goes(self, family: Family, pattern: Pattern) -> bool:
        """Whether a unit with these of its slices at zero can be erased."""
        if not any(pattern):
            return False
        zeros = [part for part, zero in zip(family.slices, pattern, strict=True) if zero]
        if all(part in zeros for part in family.zeroed or family.writers):
            return True  # where the flow of the analysis itself began
        flow = self._flow(family, pattern)
        # The erase folds and corrects as the analysis says, so that must be what is needed here.
        return (
            not flow.losses
            and flow.folds == dict(family.folds)
            and flow.corrections.keys() == family.corrected
        )

    def _flow(self, family: Family, pattern: Pattern) -> Flow:
        start: dict[fx.Node, list[Value | None]] = {}
        for part, zero in zip(family.slices, pattern, strict=True):
            node = self.nodes[part.name]
            row = start.setdefault(node, [None] * len(self.families.axis_map.terms(node)))
            row[part.axis] = ZERO if zero else UNKNOWN
        flow = Flow(self.families.index, family.atom)
        flow.run(start)
        return flow
