"""An op between two layers, through which a family of units runs; and what must hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tests.zoo.oracle import Captured, captured, check_family
from tests.zoo.zoo_model import ZooModel
from torchlathe.passes import ZeroInvariantGroups

__all__ = ["check_between", "families_of"]


def families_of(case: Captured) -> Any:
    return case.program.analysis(ZeroInvariantGroups)


def check_between(
    make: Any,
    options: Mapping[str, Any],
    *,
    free: Mapping[str, str] | None = None,
    pinned: Mapping[str, str] | None = None,
) -> Captured:
    """Capture a module with a dynamic batch, and hold every family to what is declared of it.

    Args:
        make: Builds the module.
        options: Its inputs, as `images`, `vectors` or `sequences` of the zoo gives them.
        free: Families that must be there, with the beginning of their exactness.
        pinned: Families that must be pinned, with words of the reason.
    """
    case = captured(ZooModel("between", make, **options), torch.float64)
    assert not families_of(case).axis_map.unruled, families_of(case).axis_map.unruled
    families = families_of(case)
    for name, exactness in (free or {}).items():
        family = families.by_name(name)
        assert family.prunable, str(family)
        assert family.exactness == exactness, (str(family), family.reasons)
    for name, reason in (pinned or {}).items():
        family = families.by_name(name)
        assert any(reason in str(pin) for pin in family.pins), (str(family), family.pins)
    for family in families.prunable:
        generator = torch.Generator().manual_seed(family.extent)
        count = int(torch.randint(1, family.extent, (), generator=generator))
        check_family(case, family, torch.randperm(family.extent, generator=generator)[:count])
    return case
