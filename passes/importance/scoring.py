"""From what a user asked for to scores of every unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from torchlathe.ir import InputError, OptionError, PreconditionError, Program
from torchlathe.ir.fakes import valueless
from torchlathe.passes.analysis.families import Families, Family
from torchlathe.passes.base import PassContext
from torchlathe.passes.importance.criterion import Criterion, Scoring
from torchlathe.passes.importance.table import get_criterion

__all__ = ["Importance", "comparable", "need_values", "resolve", "scores"]

# A criterion, by name or not; a function of (family, program); or scores, by family name.
Importance: TypeAlias = (
    str
    | Criterion
    | Callable[[Family, Program], torch.Tensor]
    | torch.Tensor
    | Mapping[str, torch.Tensor]
)


def resolve(importance: Importance) -> Importance:
    """A criterion in place of its name; anything else as it is.

    Raises:
        OptionError: An unknown name.
    """
    return get_criterion(importance)() if isinstance(importance, str) else importance


def comparable(importance: Importance) -> bool:
    """Whether scores of different families are on one scale, and need no normalising."""
    found = resolve(importance)
    return isinstance(found, Criterion) and found.comparable


def scores(
    program: Program,
    families: Families,
    chosen: tuple[Family, ...],
    importance: Importance,
    ctx: PassContext,
) -> dict[Family, torch.Tensor]:
    """Scores of all units; the lowest are erased first.

    Args:
        program: Where the tensors are.
        families: The analysis that ``chosen`` comes from.
        chosen: The families to score.
        importance: A criterion or its name, a function, or given scores.
        ctx: Calibration data, the loss and the seed, for the criteria that use them; what they
            had to make do without goes to its diagnostics.

    Returns:
        Per family, float64 on the CPU, shape (extent,). Infinite scores always stay.

    Raises:
        OptionError: An unknown criterion, or scores of the wrong shape.
        PreconditionError: A criterion needs data or a loss that was not given, or weights that
            have no values.
        InputError: NaN among the scores, for instance because a weight holds NaN.
    """
    found: Mapping[Family, Any]
    importance = resolve(importance)
    if isinstance(importance, Criterion):
        need_values(importance, program)
        found = importance.scores(Scoring(program, families, chosen, ctx))
    else:
        found = {f: _given(importance, f, program, len(chosen)) for f in chosen}
    return {family: _checked(found[family], family, program) for family in chosen}


def need_values(importance: Importance, program: Program) -> None:
    """Refuse to rank what was captured without memory for its weights.

    Raises:
        PreconditionError: A criterion that reads values, and parameters that have none.
    """
    criterion = resolve(importance)
    if not isinstance(criterion, Criterion) or not criterion.reads_values:
        return
    empty = [name for name, tensor in program.parameters.items() if valueless(tensor)]
    if empty:
        raise PreconditionError(
            f"importance={criterion.name} ranks units by values, but {len(empty)} parameters have "
            f"none ({empty[0]}, ...): the model is on the meta device, or fake",
            hint="importance=random with scope=local plans how many units go from each family",
        )


def _checked(score: object, family: Family, program: Program) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"scores of {family.name} are not numbers but {type(score).__name__}",
            hint=f"give {family.extent} numbers, the higher the more important",
        ) from error
    tensor = tensor.detach().to("cpu", torch.float64)
    if tensor.shape != (family.extent,):
        raise OptionError(
            f"scores of {family.name} have shape {tuple(tensor.shape)}, expected ({family.extent},)"
        )
    if bool(tensor.isnan().any()):
        raise InputError(
            f"the importance of {family.name} is NaN",
            where=", ".join(_with_nan(family, program)),
            hint="look for what made it diverge",
        )
    return tensor


def _with_nan(family: Family, program: Program) -> list[str]:
    """The tensors of a family that hold NaN."""
    names = dict.fromkeys(s.name for s in family.slices)
    return [n for n in names if bool(program.entries[n].tensor.detach().isnan().any())]


def _given(
    importance: Callable[[Family, Program], torch.Tensor]
    | torch.Tensor
    | Mapping[str, torch.Tensor]
    | str,
    family: Family,
    program: Program,
    count: int,
) -> object:
    assert not isinstance(importance, str)  # resolved
    if isinstance(importance, torch.Tensor):
        if count != 1:
            raise OptionError(
                f"one tensor of scores was given for {count} families",
                hint="give a dict from family name to scores, or select one family by include",
            )
        return importance
    if isinstance(importance, Mapping):
        if family.name not in importance:
            raise OptionError(
                f"no scores were given for {family.name}",
                hint="give scores for each family that may be erased, or exclude it",
            )
        return importance[family.name]
    return importance(family, program)
