"""Budgets of a whole model: what options ask for, turned into limits on what a program costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torchlathe.ir import OptionError, Program
from torchlathe.passes.analysis.families import Family
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.quantities import BYTES, COUNT, TIME, Quantity, Unit, quantity
from torchlathe.passes.rewrite.allocation.climbing import Limit

if TYPE_CHECKING:
    from torchlathe.passes.rewrite.allocation.ladders import Floors
    from torchlathe.passes.rewrite.allocation.sizes import Sizes

__all__ = ["UNITS", "Goal", "Ramp", "budgets", "shortfall", "unit_costs"]

UNITS: dict[str, Unit] = {"params": COUNT, "bytes": BYTES, "flops": COUNT, "latency": TIME}


def budgets(given: Mapping[str, float | str | None], where: str) -> dict[str, Quantity]:
    """Read the budgets that are not None.

    Raises:
        OptionError: One is no amount of its unit.
    """
    return {
        name: quantity(value, UNITS[name], name=name, where=where)
        for name, value in given.items()
        if value is not None
    }


@dataclass(frozen=True)
class Ramp:
    """How a share shrinks over several steps.

    Attributes:
        steps: Number of steps.
        kind: ``"geometric"``: each step keeps the same share of what is left; ``"linear"``: each
            takes the same amount.
    """

    steps: int = 1
    kind: str = "geometric"

    def share(self, final: float, step: int) -> float:
        """What is kept of the whole after a step, from 1, if ``final`` is kept in the end."""
        if step >= self.steps:
            return final
        if self.kind == "linear":
            return 1 - (1 - final) * step / self.steps
        return float(final ** (step / self.steps))


@dataclass
class Goal:
    """Where each budget has to be in the end, and where it began.

    Attributes:
        before: What the program cost before the pass, by budget.
        after: What it may cost after it.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: Mapping[str, Quantity], whole: Mapping[str, float], where: str) -> Goal:
        """The goal for a program that costs ``whole``.

        Raises:
            OptionError: A budget is below one unit of what it counts.
        """
        after = {name: amount.of(whole[name]) for name, amount in wanted.items()}
        for name, value in after.items():
            if UNITS[name] is not TIME and value < 1:
                raise OptionError(f"{name} leaves nothing of {whole[name]:.0f}", where=where)
        return cls(dict(whole), after)

    def at(self, name: str, ramp: Ramp, step: int) -> float:
        """What a budget may be after a step."""
        before, after = self.before[name], self.after[name]
        if after >= before:
            return after
        return before * ramp.share(after / before, step)


def whole_costs(program: Program, names: Iterable[str]) -> dict[str, float]:
    """What a program costs, for those of the budgets that need no clock.

    Raises:
        InputError: FLOPs are asked for, and depend on data.
    """
    counts: dict[str, Callable[[], float]] = {
        "params": lambda: program.cost().parameters,
        "bytes": lambda: program.cost().bytes,
        "flops": lambda: program.cost().flops_at(),
    }
    return {name: float(counts[name]()) for name in names if name in counts}


def measures(sizes: Sizes) -> dict[str, Callable[[Mapping[int, int]], float]]:
    """What predicts each budget from kept units."""
    return {"params": sizes.parameters, "bytes": sizes.bytes, "flops": sizes.flops}


def unit_costs(sizes: Sizes, chosen: Iterable[Family], names: Iterable[str]) -> dict[Family, float]:
    """What one unit of each family saves, as a share of the program, summed over budgets.

    FLOPs stand in for latency, which steps and wobbles too much to be asked for single units.
    """
    known = measures(sizes)
    counted = dict.fromkeys("flops" if name == "latency" else name for name in names)
    whole = {name: max(known[name]({}), 1) for name in counted or ("params",)}
    saved: dict[Family, float] = {}
    for family in chosen:
        unit = sizes.saved(family)
        saved[family] = sum(unit[name] / total for name, total in whole.items())
    # What saves next to nothing is not worth any loss, and must not divide by zero.
    least = 1e-3 * max(saved.values(), default=1.0) or 1.0
    return {family: max(cost, least) for family, cost in saved.items()}


def shortfall(
    limit: Limit, reached: float, kept: Mapping[Family, int], floors: Floors, pinned: str
) -> Diagnostic:
    """The warning that a limit does not hold, with how far it got and what stopped it."""
    unit = UNITS.get(limit.name, COUNT)
    if unit is TIME:
        asked, got = f"{limit.most * 1e3:.3g} ms", f"{reached * 1e3:.3g} ms"
    else:
        asked, got = f"{limit.most:,.0f}{unit.symbol}", f"{reached:,.0f}{unit.symbol}"
    stopped = sum(k <= floors.of(f) for f, k in kept.items())
    return Diagnostic(
        "warning",
        f"asked for {limit.name} of at most {asked}, but {got} is what was reached: {stopped} of "
        f"{len(kept)} families are at their floor (keep_at_least={floors.keep_at_least:g}, "
        f"round_to={floors.round_to}); {pinned}",
    )
