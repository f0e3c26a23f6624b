"""Criteria that weigh weights by the activations that they multiply."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchlathe.passes.analysis.families import Family, ParameterSlice
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.importance.criterion import Criterion, Scoring
from torchlathe.passes.importance.sums import PowerSums
from torchlathe.passes.statistics import Moments, Reader, Watch, collect_moments, readers_of
from torchlathe.passes.statistics.running import need_data

__all__ = ["Flap", "Wanda"]


@dataclass(frozen=True)
class _ActivationWeighted(Criterion):
    """A sum over the weights of what reads a unit, each weighed by statistics of its input.

    A unit that no contraction with a parameter reads (a dimension that queries and keys share) is
    scored by the weights that write it, in the same way; one that has neither, by l2.
    """

    @abstractmethod
    def weigh(self, matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
        """The score of each weight.

        Args:
            matrix: Shape (groups, outs, read).
            moments: Of the input, (groups, read).
        """

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """Sum over the reading weights."""
        need_data(scoring.ctx, f"{self.name} weighs weights by activations")
        readers: dict[str, list[Reader]] = {}
        for reader in readers_of(scoring.program).values():
            readers.setdefault(reader.weight, []).append(reader)
        chosen = {family: _parts(scoring, family, readers) for family in scoring.chosen}
        used = {r for parts in chosen.values() for part in parts for r in readers[part.name]}
        # One watch for all that read the same value in the same way.
        keys = {r: (r.operand, r.data_axes, r.groups, r.read) for r in used}
        watches = {keys[r]: Watch(r.operand, r.data_rows) for r in used}
        moments = collect_moments(scoring.program, scoring.ctx, watches.values())
        weighed: dict[str, torch.Tensor] = {}
        for name, found in readers.items():
            for reader in used.intersection(found):
                tensor = _wide(scoring.tensor(name))
                matrix = self.weigh(reader.weight_matrix(tensor), moments[watches[keys[reader]]])
                score = reader.weight_from(matrix, tensor.shape)
                weighed[name] = weighed[name] + score if name in weighed else score
        self._note(scoring, chosen)
        return {f: _summed(scoring, f, parts, weighed) for f, parts in chosen.items()}

    def _note(self, scoring: Scoring, chosen: Mapping[Family, list[ParameterSlice]]) -> None:
        without = [family.name for family, parts in chosen.items() if not parts]
        if without:
            names = ", ".join(without[:3])
            message = f"no contraction with a parameter meets it, so l2 scores it: {names}"
            scoring.ctx.tell(Diagnostic("note", message, name=without[0]))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parts(
    scoring: Scoring, family: Family, readers: Mapping[str, list[Reader]]
) -> list[ParameterSlice]:
    """The slices to score: on the read axis of contractions, else on another of their axes."""
    owned = [part for part in scoring.owned(family) if part.name in readers]
    reading = [p for p in owned if all(p.axis == r.read_axis for r in readers[p.name])]
    return [p for p in reading if not p.writes] or [p for p in owned if p.writes]


def _summed(
    scoring: Scoring,
    family: Family,
    parts: list[ParameterSlice],
    weighed: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    if not parts:
        return PowerSums(scoring, 2).mean(family).sqrt()
    total = torch.zeros(family.extent, dtype=torch.float64)
    for part in parts:
        tensor = weighed[part.name]
        others = [d for d in range(tensor.dim()) if d != part.axis]
        total += scoring.per_unit(family, part, tensor.sum(others, dtype=torch.float64))
    return total


@dataclass(frozen=True)
class Wanda(_ActivationWeighted):
    """Magnitude of the reading weights times the root mean square of what they multiply.

    Source: Wanda, arXiv 2306.11695, section 3 (``|W| ||X||``), summed over the weights of a unit.
    """

    name: ClassVar[str] = "wanda"

    def weigh(self, matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
        """``|W| sqrt(E[x^2])``."""
        scale: torch.Tensor = moments.norm / math.sqrt(max(1, moments.count))
        return matrix.abs().double() * scale[:, None, :]


@dataclass(frozen=True)
class Flap(_ActivationWeighted):
    """Variance of what is read, times the squared norm of the weights that read it.

    What does not fluctuate can be made up for by a bias, as `Compensation` does.

    Source: FLAP, arXiv 2312.11983, equation 5 (weighted input feature variance).
    """

    name: ClassVar[str] = "flap"

    def weigh(self, matrix: torch.Tensor, moments: Moments) -> torch.Tensor:
        """``W^2 var(x)``."""
        return matrix.double().square() * moments.variance[:, None, :]
