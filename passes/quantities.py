"""Amounts as options have them: a share to keep (``0.5``, ``50%``), or ``20M``, ``1.5GB``, ``5ms``.

Every pass that takes a budget reads it here, so that ``params=0.5`` means the same to all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torchlathe.ir import OptionError

__all__ = ["BYTES", "COUNT", "TIME", "Quantity", "quantity"]

_TEXT = re.compile(r"(?P<number>[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(?P<unit>[A-Za-zµ%]*)")


@dataclass(frozen=True)
class Unit:
    """What an amount is measured in.

    Attributes:
        symbol: Of one of it, for messages; may be empty.
        factors: How many it is to each suffix.
        bare: Whether a number without a suffix, if above 1, is an amount.
        example: How to write one, for hints.
    """

    symbol: str
    factors: Mapping[str, float]
    bare: bool
    example: str


_DECIMAL = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
COUNT = Unit("", _DECIMAL, True, "0.5 for half, 20M, or 1.5G")
BYTES = Unit(
    "B",
    {
        **{k: n for k, n in _DECIMAL.items() if k != "B"},
        "B": 1.0,
        **{f"{k}B": n for k, n in _DECIMAL.items() if k != "B"},
        **{f"{k}iB": 1024.0**power for power, k in enumerate("KMGT", 1)},
    },
    True,
    "0.5 for half, 20MB, or 512KiB",
)
TIME = Unit(
    "s",
    {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0},
    False,
    "0.7 for 70 % of the measured time, or 5ms",
)


@dataclass(frozen=True)
class Quantity:
    """An amount, or a share of what there is.

    Attributes:
        value: In the unit itself (bytes, seconds), or a share in (0, 1].
        relative: Whether it is a share.
    """

    value: float
    relative: bool

    def of(self, whole: float) -> float:
        """The amount, where there is ``whole`` in all."""
        return self.value * whole if self.relative else self.value


def quantity(value: float | str, unit: Unit, *, name: str, where: str | None = None) -> Quantity:
    """Read an amount.

    A number up to 1 and a percentage are shares of what there is; everything else is absolute.

    Args:
        value: As the option has it.
        unit: What it is measured in.
        name: Of the option, for messages.
        where: Name of the pass, for messages.

    Raises:
        OptionError: It is not an amount of this unit, or not above zero.
    """

    def refuse(why: str) -> OptionError:
        return OptionError(f"{name} is {value}, {why}", where=where, hint=f"write {unit.example}")

    if isinstance(value, str):
        match = _TEXT.fullmatch(value.strip())
        if match is None:
            raise refuse("which is not a number with a unit")
        number, suffix = float(match["number"]), match["unit"]
    else:
        number, suffix = float(value), ""
    if not (number > 0 and math.isfinite(number)):
        raise refuse("but must be above 0")
    if suffix == "%":
        if number > 100:
            raise refuse("but more than there is cannot be kept")
        return Quantity(number / 100, relative=True)
    if suffix:
        if suffix not in unit.factors:
            raise refuse(f"but the units are {', '.join(unit.factors)} and %")
        return Quantity(number * unit.factors[suffix], relative=False)
    if number <= 1:
        return Quantity(number, relative=True)
    if not unit.bare:
        raise refuse("which is neither a share, up to 1, nor has a unit")
    return Quantity(number, relative=False)
