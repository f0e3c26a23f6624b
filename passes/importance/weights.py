"""Criteria that read the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import InputError
from torchlathe.ir.axes import rule_of
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.axes.rules.group_norm import GroupNorm
from torchlathe.ir.axes.rules.normalization import BatchNorm, InstanceNorm, LayerNorm
from torchlathe.ir.provenance import info
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.importance.criterion import Criterion, Scoring
from torchlathe.passes.importance.sums import PowerSums

__all__ = ["L1", "L2", "BnScale", "Lamp", "Random"]

_NORMS = (BatchNorm, GroupNorm, InstanceNorm, LayerNorm)


@dataclass(frozen=True)
class L1(Criterion):
    """Mean absolute value of the parameters of a unit, writers and readers alike.

    Source: Li et al., arXiv 1608.08710, on coupled slices; the mean is own.
    """

    name: ClassVar[str] = "l1"
    comparable: ClassVar[bool] = True  # a mean over parameters knows no size of a layer

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """``sum |w| / count``."""
        sums = PowerSums(scoring, 1)
        return {family: sums.mean(family) for family in scoring.chosen}


@dataclass(frozen=True)
class L2(Criterion):
    """Root mean square of the parameters of a unit, writers and readers alike.

    Source: own; group norms are those of OTO (arXiv 2107.07467) and DepGraph (arXiv 2301.12900).
    """

    name: ClassVar[str] = "l2"
    comparable: ClassVar[bool] = True

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """``sqrt(sum w^2 / count)``."""
        sums = PowerSums(scoring, 2)
        return {family: sums.mean(family).sqrt() for family in scoring.chosen}


@dataclass(frozen=True)
class Lamp(Criterion):
    """Squared norm of a unit over that of all units of its family that are at least as large.

    The best unit of each family scores 1, so that none is emptied, and scores of different
    families compare.

    Source: arXiv 2010.07611, equation 5, on the squared norm of what a unit owns.
    """

    name: ClassVar[str] = "lamp"
    comparable: ClassVar[bool] = True

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """``s_u / sum of s_v over all v with s_v >= s_u``, where s is the sum of squares."""
        sums = PowerSums(scoring, 2)
        return {family: _lamp(sums.total(family)) for family in scoring.chosen}


def _lamp(squares: torch.Tensor) -> torch.Tensor:
    ordered, order = squares.sort(descending=True, stable=True)
    at_least = ordered.cumsum(0)
    # Equal ones count each other, so that the order of units does not matter.
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    found = torch.empty_like(squares)
    found[order] = ordered / at_least[last].clamp_min(torch.finfo(torch.float64).tiny)
    return found


@dataclass(frozen=True)
class BnScale(Criterion):
    """Mean absolute scale of the norms (batch, group, layer, RMS) that write a unit.

    Attributes:
        missing: What to do with a family that no norm writes: "l2", with a note, or "error".
            These two are on different scales, which matters where families are ranked together.

    Source: Network Slimming, arXiv 1708.06519; norms other than batch norm are own.
    """

    name: ClassVar[str] = "bn-scale"

    missing: Literal["l2", "error"] = "l2"

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """``mean |gamma|``."""
        gammas = _norm_scales(scoring)
        squares = PowerSums(scoring, 2)
        found: dict[Family, torch.Tensor] = {}
        without: list[str] = []
        for family in scoring.chosen:
            parts = [p for p in family.writers if p.name in gammas]
            if not parts:
                without.append(family.name)
                found[family] = squares.mean(family).sqrt()
                continue
            total = torch.zeros(family.extent, dtype=torch.float64)
            for part in parts:
                total += scoring.per_unit(family, part, scoring.tensor(part.name).abs().flatten())
            found[family] = total / sum(part.repeat for part in parts)
        if without:
            self._missing(scoring, without)
        return found

    def _missing(self, scoring: Scoring, without: list[str]) -> None:
        names = ", ".join(without[:3]) + (f" and {len(without) - 3} more" * (len(without) > 3))
        if self.missing == "error":
            raise InputError(
                f"no norm with a scale writes {names}",
                hint="leave these out by exclude, or choose another importance",
            )
        message = f"no norm with a scale writes it, so l2 scores it: {names}"
        scoring.ctx.tell(Diagnostic("note", message, name=without[0]))


def _norm_scales(scoring: Scoring) -> set[str]:
    """Names of the vectors that a norm scales its channels by, in one op or written out."""
    found = set()
    for name, placeholder in scoring.nodes.items():
        tensor = scoring.program.entries[name].tensor
        if tensor.dim() != 1:
            continue
        for user in placeholder.users:
            fused = isinstance(rule_of(user), _NORMS) and argument(user, "weight") is placeholder
            product = user.target is torch.ops.aten.mul.Tensor
            if fused or (product and _normalised(user, placeholder)):
                found.add(name)
    return found


def _normalised(product: fx.Node, scale: fx.Node) -> bool:
    """Whether the other factor is ``x * rsqrt(...)``, perhaps cast, as RMS norms write it."""
    for factor in product.all_input_nodes:
        if factor is scale or info(factor).tensor is not None:
            continue
        while factor.op == "call_function" and len(factor.all_input_nodes) == 1:
            factor = factor.all_input_nodes[0]
        names = {getattr(used.target, "__name__", "") for used in factor.all_input_nodes}
        if any(name.startswith(("rsqrt", "sqrt")) for name in names):
            return True
    return False


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random numbers by the seed; the baseline that a criterion has to beat.

    Source: own.
    """

    name: ClassVar[str] = "random"
    reads_values: ClassVar[bool] = False

    def scores(self, scoring: Scoring) -> Mapping[Family, torch.Tensor]:
        """Uniform in [0, 1)."""
        generator = torch.Generator().manual_seed(scoring.ctx.seed)
        return {
            family: torch.rand(family.extent, generator=generator, dtype=torch.float64)
            for family in scoring.chosen
        }
