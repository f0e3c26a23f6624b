"""Which of several choices changes the outputs least, measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torchlathe.ir import Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.factorising.making import Factors
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.networks import make_any, write_any
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sensitivity import outputs_of
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["changes_of_outputs"]

_BATCHES = 4


def changes_of_outputs(
    program: Program,
    ctx: PassContext,
    candidates: Sequence[Sequence[Plan]],
    metrics: Metrics,
    damping: float,
) -> tuple[list[float], dict[Plan, Factors]]:
    """Relative squared change of the outputs on a few batches, if all plans of one are carried out.

    Sums of what each layer does alone, by which plans are chosen, do not know how errors of several
    layers meet; this does, for as many choices as one can afford to carry out.

    Args:
        program: Left as it is.
        ctx: The batches (or example inputs) and where progress goes.
        candidates: Plans for the layers that are split.
        metrics: The norms that plans are made in.
        damping: As `make_any` takes it.

    Returns:
        A number for each candidate, and the factors of all their plans.
    """
    batches = [flat for _, flat in itertools.islice(flat_batches(program, ctx), _BATCHES)]
    expected = [outputs_of(program, flat) for flat in batches]
    whole = sum(float(value.square().sum()) for values in expected for value in values)
    made: dict[Plan, Factors] = {}
    found = []
    for number, plans in enumerate(candidates):
        ctx.report(f"trying choice {number + 1}/{len(candidates)}")
        for plan in plans:
            if plan not in made:
                made[plan] = make_any(plan, program, metrics, damping, ctx.seed)
        copy = program.copy()
        theirs = {site.weight: site for site in find_sites(copy)[0]}
        with copy.edit(by=ctx.spec) as edit:
            for plan in plans:
                sites = tuple(theirs[site.weight] for site in plan.sites)
                write_any(edit, replace(plan, sites=sites), made[plan])
        gap = 0.0
        for flat, wanted in zip(batches, expected, strict=True):
            pairs = zip(outputs_of(copy, flat), wanted, strict=True)
            gap += sum(float((new - old).square().sum()) for new, old in pairs)
        found.append(gap / whole if whole else 0.0)
    return found, made
