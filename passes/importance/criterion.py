"""What a criterion is, and what it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind
from torchlathe.ir.axes import Term
from torchlathe.passes.analysis.families import Families, Family, ParameterSlice
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.erasing.units import sum_by_unit, unit_indices

__all__ = ["Criterion", "Scoring"]


@dataclass(frozen=True)
class Criterion(ABC):
    """One way of scoring units. A subclass is a frozen dataclass whose fields are its options.

    Attributes:
        name: How text pipelines call it.
        comparable: Whether scores of different families are on one scale, such as a change of the
            loss, so that ranking over families needs no normalising.
        reads_values: Whether it looks at weights or data, and so needs tensors that have values.
    """

    name: ClassVar[str]
    comparable: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    @abstractmethod
    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """Scores of the units of all of ``scoring.chosen``, shape (extent,) each; higher stays.

        Raises:
            Error: Of the kind that fits, for instance PreconditionError without a loss.
        """


@dataclass
class Scoring:
    """What a criterion is given: the families to score, and sums over what their units own.

    Attributes:
        program: Where the tensors are.
        families: The analysis that ``chosen`` comes from.
        chosen: The families to score.
        ctx: Calibration data, the loss, the seed, and where diagnostics go.
    """

    program: Program
    families: Families
    chosen: tuple[Family, ...]
    ctx: PassContext
    _owners: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Placeholders of the tensors, by name."""
        return self.program.tensor_nodes

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, detached."""
        return self.program.entries[name].tensor.detach()

    def owned(self, family: Family) -> Iterator[ParameterSlice]:
        """The slices of a family that are of floating parameters."""
        for part in family.slices:
            floating = self.program.entries[part.name].tensor.is_floating_point()
            if part.kind is TensorKind.PARAMETER and floating:
                yield part

    def owner(self, family: Family, part: ParameterSlice) -> torch.Tensor:
        """Which unit each index of a slice's axis belongs to, shape (axis,); -1 for none."""
        key = (part.name, part.axis, family.atom.number)
        if key not in self._owners:
            self._owners[key] = unit_indices(self._term(part), family.atom.number)
        return self._owners[key]

    def _term(self, part: ParameterSlice) -> Term:
        return self.families.axis_map.terms(self.nodes[part.name])[part.axis]

    def per_unit(self, family: Family, part: ParameterSlice, values: torch.Tensor) -> torch.Tensor:
        """Sum values, one per index of a slice's axis, into units.

        Args:
            family: The family.
            part: One of its slices.
            values: Shape (axis,).

        Returns:
            Float64 on the CPU, shape (extent,); the values themselves where there is nothing to
            sum.
        """
        wide = values.to("cpu", torch.float64)
        return sum_by_unit(self._term(part), family.atom.number, wide)

    def rows(self, family: Family, part: ParameterSlice) -> torch.Tensor:
        """What each unit owns of one tensor, as a row; shape (extent, ...) flattened to two."""
        tensor = self.tensor(part.name).movedim(part.axis, 0)
        owner = self.owner(family, part)
        indices = (owner >= 0).nonzero().flatten()
        # By unit, and within a unit in the order of the axis.
        indices = indices[torch.argsort(owner[indices], stable=True)].to(tensor.device)
        return tensor[indices].reshape(family.extent, -1)
