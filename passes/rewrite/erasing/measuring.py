"""By how much erasing is inexact, measured on the example inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from torchlathe.ir import Error, Program
from torchlathe.ir.equivalence import cannot_run, check_equivalence
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.rewrite.erasing.shrink import erase_units

__all__ = ["MeasuredError", "error_notes", "measured_error"]

# Each takes two runs of the whole model.
_MOST = 32


@dataclass(frozen=True)
class MeasuredError:
    """How far a model without some units is from the full-size one with zeros in their place.

    Attributes:
        relative: Largest difference of an output over the output's largest magnitude; infinite
            where the erased model gives no finite numbers.
        absolute: Largest difference of an output.
    """

    relative: float
    absolute: float


def measured_error(program: Program, family: Family, units: torch.Tensor) -> MeasuredError:
    """Erase units of one family from a copy, and compare outputs on the example inputs.

    Args:
        program: Stays as it is.
        family: Of this program's `ZeroInvariantGroups`.
        units: int64 indices, shape (erased,).

    Raises:
        UnsupportedError: The program has no values to compute with.
    """
    after = program.copy()
    same = after.analysis(ZeroInvariantGroups).by_name(family.name)
    zeroing = erase_units(after, {same: units})
    found = check_equivalence(program, after, reference=zeroing)
    relative, absolute = found.max_rel_error, found.max_abs_error
    return MeasuredError(
        relative if math.isfinite(relative) else math.inf,
        absolute if math.isfinite(absolute) else math.inf,
    )


def error_notes(program: Program, units: Mapping[Family, torch.Tensor]) -> Iterator[Diagnostic]:
    """A note for each family whose erasing is only approximate, with its measured error.

    Args:
        program: Before anything is erased.
        units: Which units are going to be erased.
    """
    inexact = [f for f in units if f.exactness == "approximate"]
    if not inexact or cannot_run(program):
        return
    for family in sorted(inexact, key=lambda f: -f.parameters_per_unit * len(units[f]))[:_MOST]:
        count = len(units[family])
        try:
            error = measured_error(program, family, units[family])
        except Error as failed:
            text = f"its error could not be measured: {failed.message}"
        else:
            text = (
                f"erasing {count} of its units alone is off by {error.relative:.2g} of the largest "
                f"output, on the example inputs ({'; '.join(family.reasons)})"
            )
        yield Diagnostic("note", text, name=family.name)
