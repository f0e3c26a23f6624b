"""Which families a pass may touch: patterns of names, and what is left alone for what reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.families import Families, Family, ParameterSlice
from torchlathe.passes.base import Diagnostic

__all__ = ["Choice", "owns", "writes"]


@dataclass(frozen=True)
class Choice:
    """What the user lets a pass erase.

    Attributes:
        include: Patterns of families, tensors written, or ``tensor:axis``; none for all.
        exclude: Patterns of families, any of their tensors, or ``tensor:axis``.
        only: Patterns as ``include``, which hold besides it; None for all.
        approximate: Also families whose erasing is not exact.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    approximate: bool = False

    def of(self, families: Families) -> tuple[tuple[Family, ...], list[Diagnostic]]:
        """The families to erase from, and what is to be said of others."""
        chosen = []
        diagnostics = []
        for family in families.prunable:
            if not self._wanted(family):
                continue
            if family.exactness == "approximate" and not self.approximate:
                reasons = "; ".join(family.reasons)
                told = f"left alone, since erasing it is not exact: {reasons}"
                diagnostics.append(Diagnostic("note", told, name=family.name))
                continue
            chosen.append(family)
        named = (*self.include, *(self.only or ()))
        diagnostics += [
            Diagnostic("note", f"left alone, since it is pinned: {f.pins[0]}", name=f.name)
            for f in families.pinned
            if f.name in named
        ]
        return tuple(chosen), diagnostics

    def _wanted(self, family: Family) -> bool:
        if self.include and not writes(family, self.include):
            return False
        if self.only is not None and not writes(family, self.only):
            return False
        return not (self.exclude and owns(family, self.exclude))

    def check(self, families: Families, where: str) -> None:
        """Refuse a pattern that matches nothing, which is most likely a typo.

        Raises:
            OptionError: Of the first such pattern.
        """
        for pattern in (*self.include, *self.exclude, *(self.only or ())):
            if not any(owns(f, (pattern,)) for f in families):
                names = [f.name for f in families.prunable[:5]]
                raise OptionError(
                    f"the pattern {pattern!r} matches no family and no tensor",
                    where=where,
                    hint=f"families are named {', '.join(names)}, ...",
                )


def writes(family: Family, patterns: Iterable[str]) -> bool:
    """Whether a pattern names the family, a tensor that it writes, or a tensor's axis."""
    return _matches(family, family.writers, patterns)


def owns(family: Family, patterns: Iterable[str]) -> bool:
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
