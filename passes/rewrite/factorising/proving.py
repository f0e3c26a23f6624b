"""Which of several choices changes the outputs least, measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchlathe.ir import Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.factorising.making import Factors
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.networks import make_any, write_any
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sensitivity import outputs_of
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.statistics import Calibration
from torchlathe.passes.statistics.running import count_batches, flat_batches

__all__ = ["changes_of_outputs", "changes_on_held_out", "held_out"]

# One batch of so many is held out, where there are so many.
_EVERY = 4

# Choices differ by little, and so it takes many samples to tell which one is better.
_BATCHES = 32


def changes_of_outputs(
    program: Program,
    ctx: PassContext,
    candidates: Sequence[Sequence[Plan]],
    metrics: Metrics,
    damping: float,
) -> tuple[list[float], dict[Plan, Factors]]:
    """Relative squared change of the outputs on the batches, if all plans of one are carried out.

    Sums of what each layer does alone, by which plans are chosen, do not know how errors of several
    layers meet; this does, for as many choices as one can afford to carry out.

    Args:
        program: Left as it is.
        ctx: The batches (or example inputs) and where progress goes.
        candidates: Plans for the layers that are split.
        metrics: The norms that plans are made in.
        damping: As `make_any` takes it.

    Returns:
        A number for each candidate, and factors, those of the best one's plans among them.
    """
    made: dict[Plan, Factors] = {}
    found = []
    for number, plans in enumerate(candidates):
        ctx.report(f"trying choice {number + 1}/{len(candidates)}")
        for plan in plans:
            if plan not in made:
                made[plan] = make_any(plan, program, metrics, damping, ctx.seed)
        after = program.copy()
        theirs = {site.weight: site for site in find_sites(after)[0]}
        with after.edit(by=ctx.spec) as edit:
            for plan in plans:
                sites = tuple(theirs[site.weight] for site in plan.sites)
                write_any(edit, replace(plan, sites=sites), made[plan])
        found.append(_change(program, after, ctx))
        # Only what is still to be written is kept, by a later candidate or as the best one.
        best = candidates[min(range(len(found)), key=found.__getitem__)]
        needed = {*best, *itertools.chain(*candidates[number + 1 :])}
        made = {plan: factors for plan, factors in made.items() if plan in needed}
    return found, made


def _change(before: Program, after: Program, ctx: PassContext) -> float:
    """Squared change of the outputs over their squares; holds the outputs of one batch."""
    gap = whole = 0.0
    for _, flat in itertools.islice(flat_batches(before, ctx), _BATCHES):
        for old, new in zip(outputs_of(before, flat), outputs_of(after, flat), strict=True):
            whole += float(old.square().sum())
            gap += float((new - old).square().sum())
    return gap / whole if whole else 0.0


@dataclass(frozen=True)
class _Part:
    """The batches that are held out, or all others."""

    batches: Iterable[Any]
    held: bool

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.batches):
            if (index % _EVERY == _EVERY - 1) is self.held:
                yield batch


def held_out(ctx: PassContext) -> tuple[PassContext, PassContext] | None:
    """The context with most of the batches, and with every fourth one; None if there are few."""
    data = ctx.calibration
    count = None if data is None else count_batches(ctx)
    if data is None or count is None or count < _EVERY:
        return None
    settings = copy.copy(data) if isinstance(data, Calibration) else Calibration(())
    # A state that was saved of all batches is none of most of them.
    settings.resume = None
    settings.batches = _Part(data, held=False)
    return replace(ctx, calibration=settings), replace(ctx, calibration=_Part(data, held=True))


def changes_on_held_out(
    program: Program,
    ctx: PassContext,
    candidates: Sequence[Sequence[Plan]],
    metrics: Metrics,
    method: str,
    damping: float,
) -> tuple[list[float], dict[Plan, Factors]]:
    """`changes_of_outputs` on batches that the tried factors are not made of, if there are enough.

    On the data that they are made for, factors with more freedom look better than they are. So the
    statistics are collected again, without every fourth batch, and the choices tried on those.

    Args:
        program: Left as it is.
        ctx: The batches and where progress goes.
        candidates: Plans for the layers that are split.
        metrics: Of all batches.
        method: As `collect_metrics` takes it.
        damping: As `make_any` takes it.

    Returns:
        A number for each candidate, and those factors that are made of all batches.
    """
    parts = held_out(ctx)
    if parts is None:
        return changes_of_outputs(program, ctx, candidates, metrics, damping)
    most, few = parts
    sites = dict.fromkeys(site for plans in candidates for plan in plans for site in plan.sites)
    known = replace(collect_metrics(program, most, sites, method), effects=metrics.effects)
    return changes_of_outputs(program, few, candidates, known, damping)[0], {}
