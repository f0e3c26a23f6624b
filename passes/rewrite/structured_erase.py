"""Erase whole channels, heads and other coupled slices, lowest importance first."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from torchlathe.ir import InputError, OptionError, Program
from torchlathe.passes.analysis.families import (
    Families,
    Family,
    ParameterSlice,
    ZeroInvariantGroups,
)
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.erase import erase_units
from torchlathe.passes.rewrite.importance import scores
from torchlathe.passes.rewrite.selection import (
    Sizes,
    select_by_share,
    select_global,
    select_local,
)
from torchlathe.passes.rewrite.units import unit_indices

__all__ = ["StructuredErase"]


@dataclass(frozen=True)
class StructuredErase(RewritePass):
    """Erases the least important units of the families of coupled slices.

    Keeps: the outputs of the model in which the slices that write the erased indices are zero
    (exactly; means and norms over an erased axis are corrected). Changes: shapes of parameters,
    and every static integer that follows from them.

    Families whose erasing cannot be made exact are left alone unless ``approximate`` is set;
    ``torchlathe inspect MODEL --families`` lists them with the reasons.

    Source: own (axis terms); the norm corrections are derived in ``docs/structured_erase.md``.
    """

    name: ClassVar[str] = "structured-erase"
    requires: ClassVar = (ZeroInvariantGroups,)
    exactness: ClassVar[Exactness] = Exactness.EXACT

    sparsity: float | dict[str, float] = field(
        default=0.5,
        metadata={
            "help": "share of the prunable parameters to erase, in [0, 1); or a dict from family "
            "name (or pattern with * and ?) to the share of its units"
        },
    )
    importance: str | Callable[..., torch.Tensor] | torch.Tensor | dict[str, torch.Tensor] = field(
        default="l2",
        metadata={
            "help": '"l2", "l1", "random", a callable (family, program) -> scores, a tensor of '
            "scores, or a dict of them by family name"
        },
    )
    scope: Literal["global", "local"] = field(
        default="global",
        metadata={"help": "rank units over all families, or erase the same share of each"},
    )
    round_to: int = field(
        default=1, metadata={"help": "kept units per family are a multiple of this"}
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "erase only these: patterns of families, tensors written, or tensor:axis"
        },
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "leave these alone: patterns of families, any of their tensors, or tensor:axis"
        },
    )
    keep_at_least: float = field(
        default=1, metadata={"help": "units to keep per family: a count, or a share if below 1"}
    )
    zeros: bool = field(
        default=False, metadata={"help": "erase just the units that are zero already"}
    )
    approximate: bool = field(
        default=False, metadata={"help": "also erase families for which it is not exact"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: A share outside [0, 1), or a count below 1.
        """
        super().__post_init__()
        shares = self.sparsity if isinstance(self.sparsity, Mapping) else {"": self.sparsity}
        for pattern, share in shares.items():
            if not 0 <= share < 1:
                at = f" for {pattern!r}" if pattern else ""
                raise OptionError(
                    f"sparsity{at} is {share}, but must be in [0, 1)",
                    where=self.name,
                    hint="it is the share that is erased: 0.5 halves the prunable parameters",
                )
        if self.round_to < 1:
            raise OptionError(f"round_to is {self.round_to}, but must be at least 1")
        least = self.keep_at_least
        if not least > 0 or (least >= 1 and least % 1 != 0):
            raise OptionError(
                f"keep_at_least is {least}, but must be a share between 0 and 1, or a whole number"
            )
        if isinstance(self.importance, str) and self.importance not in ("l2", "l1", "random"):
            raise OptionError(
                f"importance={self.importance!r} is not known",
                where=self.name,
                hint="one of l2, l1, random; from Python also a callable or scores",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Choose units, erase them, and say what was left alone and why."""
        families = ctx.analysis(ZeroInvariantGroups)
        chosen, diagnostics = self._choose(families)
        if self.zeros:
            units = {f: _zero_units(f, families, program) for f in chosen}
        else:
            units = self._select(program, families, chosen, ctx, diagnostics)
        units = {f: u for f, u in units.items() if len(u)}
        statistics: dict[str, int | float | str] = {
            "families": len(families),
            "prunable": len(families.prunable),
            "pinned": len(families.pinned),
            "erased_units": sum(len(u) for u in units.values()),
            "erased_families": len(units),
        }
        if not units:
            diagnostics.append(Diagnostic("warning", "there was nothing to erase"))
            return PassResult(False, statistics, diagnostics)
        exact = all(f.exactness != "approximate" for f in units)
        corrected = sum(f.exactness == "exact-after-correction" for f in units)
        statistics["corrected_families"] = corrected
        reference = erase_units(program, units, by=ctx.spec)
        return PassResult(
            True,
            statistics,
            diagnostics,
            reference=None if self.zeros else reference,
            exactness=Exactness.EXACT if exact else Exactness.APPROXIMATE,
        )

    # -- which families ----------------------------------------------------------------------

    def _choose(self, families: Families) -> tuple[tuple[Family, ...], list[Diagnostic]]:
        chosen = []
        diagnostics = []
        for family in families.prunable:
            if self.include and not _writes(family, self.include):
                continue
            if self.exclude and _owns(family, self.exclude):
                continue
            if isinstance(self.sparsity, Mapping) and not _writes(family, self.sparsity):
                continue
            if family.exactness == "approximate" and not self.approximate:
                diagnostics.append(
                    Diagnostic(
                        "note",
                        f"left alone, since erasing it is not exact: {'; '.join(family.reasons)}",
                        name=family.name,
                    )
                )
                continue
            chosen.append(family)
        self._check_patterns(families)
        named = [*self.include, *(self.sparsity if isinstance(self.sparsity, Mapping) else ())]
        diagnostics += [
            Diagnostic("note", f"left alone, since it is pinned: {f.pins[0]}", name=f.name)
            for f in families.pinned
            if f.name in named
        ]
        return tuple(chosen), diagnostics

    def _check_patterns(self, families: Families) -> None:
        """A pattern that matches nothing is most likely a typo."""
        patterns = [*self.include, *self.exclude]
        if isinstance(self.sparsity, Mapping):
            patterns += self.sparsity
        for pattern in patterns:
            if not any(_owns(f, (pattern,)) for f in families):
                names = [f.name for f in families.prunable[:5]]
                raise OptionError(
                    f"the pattern {pattern!r} matches no family and no tensor",
                    where=self.name,
                    hint=f"families are named {', '.join(names)}, ...",
                )

    # -- which units -------------------------------------------------------------------------

    def _select(
        self,
        program: Program,
        families: Families,
        chosen: tuple[Family, ...],
        ctx: PassContext,
        diagnostics: list[Diagnostic],
    ) -> dict[Family, torch.Tensor]:
        importance: Any = self.importance
        scored = scores(program, families, chosen, importance, ctx.seed)
        limits: dict[str, Any] = {
            "keep_at_least": self.keep_at_least,
            "round_to": self.round_to,
        }
        if isinstance(self.sparsity, Mapping):
            shares = {
                f: max(s for p, s in self.sparsity.items() if _writes(f, (p,))) for f in chosen
            }
            return select_by_share(scored, shares, **limits)
        if not chosen:
            return {}
        sizes = Sizes(program, families, chosen)
        select = select_global if self.scope == "global" else select_local
        units = select(sizes, scored, self.sparsity, **limits)
        kept = {f.atom.number: f.extent - len(u) for f, u in units.items()}
        erased = 1 - sizes.remaining(kept) / sizes.prunable
        slack = sum(f.parameters_per_unit for f in chosen) * self.round_to / sizes.prunable
        if erased < self.sparsity - slack:
            diagnostics.append(
                Diagnostic(
                    "warning",
                    f"asked to erase {self.sparsity:.0%} of the prunable parameters, but only "
                    f"{erased:.0%} can go: each family keeps at least {self.keep_at_least:g}",
                )
            )
        return units


def _writes(family: Family, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the family, a tensor that it writes, or a tensor's axis."""
    return _matches(family, family.writers, patterns)


def _owns(family: Family, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the family, any tensor that it owns slices of, or its axis."""
    return _matches(family, family.slices, patterns)


def _matches(family: Family, named: Iterable[ParameterSlice], patterns: Iterable[str]) -> bool:
    axes = {family.name, *(f"{s.name}:{s.axis}" for s in family.slices)}
    tensors = {s.name for s in named}
    return any(
        fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
        for name in (axes if ":" in pattern else tensors)
    )


def _zero_units(family: Family, families: Families, program: Program) -> torch.Tensor:
    """Units whose writing slices are all zero; one unit stays if all are."""
    nonzero = torch.zeros(family.extent, dtype=torch.bool)
    nodes = program.tensor_nodes
    for part in family.writers:
        tensor = program.entries[part.name].tensor.detach()
        if tensor.isnan().any():
            raise InputError(f"{part.name} holds NaN", hint="look for what made it diverge")
        others = [d for d in range(tensor.dim()) if d != part.axis]
        alive = (tensor != 0).any(dim=others) if others else tensor != 0
        term = families.axis_map.terms(nodes[part.name])[part.axis]
        owner = unit_indices(term, family.atom.number)
        nonzero[owner[alive.cpu() & (owner >= 0)]] = True
    if not bool(nonzero.any()):
        nonzero[0] = True
    return (~nonzero).nonzero().flatten()
