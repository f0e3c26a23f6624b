"""Which bond for which layer: from what the options ask for to a plan for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.ir import Program
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.factorising.budget import LayerBudget, amount_text
from torchlathe.passes.rewrite.factorising.choosing import (
    Option,
    choose_exact,
    choose_greedy,
    cost_of,
    thinned,
)
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.plans import (
    NetworkPlan,
    bond_within,
    network_error,
    network_plan,
    network_plans,
)
from torchlathe.passes.rewrite.tensor_networks.trains import tensor_train
from torchlathe.passes.rewrite.tensor_networks.writing import least_flops, rows_of

if TYPE_CHECKING:
    from torchlathe.passes.rewrite.tensor_networks.network_split import Modes, NetworkSplit

__all__ = ["Chosen", "allotted", "by_error", "of_rank", "plans_of", "uniform"]


@dataclass
class Chosen:
    """A plan for each layer that is split, in order of execution.

    Attributes:
        plans: By site.
        diagnostics: What to tell.
        options: What there was to choose from.
    """

    plans: dict[Site, NetworkPlan] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)


def of_rank(
    split: NetworkSplit,
    sites: Sequence[Site],
    modes: Mapping[Site, Modes],
    left: dict[str, str],
) -> Chosen:
    """The same bond for every layer."""
    found = Chosen()
    for site in sites:
        plan = network_plan(split.kind, *modes[site], _capped(split, split.rank or 1))
        if plan is None:
            left[site.weight] = "its cores would not be smaller"
        else:
            found.plans[site] = plan
    return found


def uniform(
    split: NetworkSplit,
    program: Program,
    sites: Sequence[Site],
    modes: Mapping[Site, Modes],
    left: dict[str, str],
) -> Chosen:
    """The same share of what each layer costs."""
    budget = _budget(split, program, sites)
    found = Chosen()
    for site in sites:
        allowed = budget.share * budget.spent[site]
        bond = _capped(split, bond_within(*modes[site], budget.share * site.parameters))
        plan = network_plan(split.kind, *modes[site], bond)
        while plan is not None and _price(program, site, plan, budget.name) > allowed:
            bond -= 1
            plan = network_plan(split.kind, *modes[site], bond)
        if plan is None:
            left[site.weight] = "the share is less than that of a bond of 1"
        else:
            found.plans[site] = plan
    return found


def by_error(
    split: NetworkSplit,
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    modes: Mapping[Site, Modes],
    metrics: Metrics,
    left: dict[str, str],
) -> Chosen:
    """The smallest bond of each layer that keeps within the error.

    In the plain norm each cut gets its part of the error. On data the bond is found by bisection,
    with a fit at each step.
    """
    found = Chosen()
    asked = split.error or 0.0
    for number, site in enumerate(sites):
        ctx.report(f"bond of {site.weight} ({number + 1}/{len(sites)})")
        matrix = site.matrices(program.tensor(site.weight).detach())[0]
        moment = metrics.moment([site])
        most = _capped(split, bond_within(*modes[site], matrix.numel() - 1))
        if moment is None:
            train = tensor_train(matrix, *modes[site], error=asked, seed=ctx.seed)
            plan = network_plan(split.kind, *modes[site], max(train.bonds))
            if plan is not None:
                plan = replace(plan, bonds=train.bonds, parameters=train.parameters)
            plan = None if max(train.bonds) > most else plan
        else:

            def fits(bond: int) -> bool:
                tried = network_plan(split.kind, *modes[site], bond)  # noqa: B023 - called here
                if tried is None:
                    return False
                cores = split.cores(tried, matrix, moment, ctx.seed)  # noqa: B023
                return network_error(cores, matrix, moment) <= asked**2  # noqa: B023

            plan = _smallest(split, modes[site], most, fits)
        if plan is None:
            left[site.weight] = f"no network of it that is smaller keeps within {asked:g}"
        else:
            found.plans[site] = plan
    return found


def _smallest(split: NetworkSplit, modes: Modes, most: int, fits: Any) -> NetworkPlan | None:
    if most < 1 or not fits(most):
        return None
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return network_plan(split.kind, *modes, high)


def allotted(
    split: NetworkSplit,
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    modes: Mapping[Site, Modes],
    metrics: Metrics,
    profile: Callable[..., list[NetworkPlan]],
    exact: bool,
) -> Chosen:
    """The bonds of least summed error within the budget."""
    budget = _budget(split, program, sites)
    options = [Option((site,), None, budget.spent[site], 0.0) for site in sites]
    for number, site in enumerate(sites):
        ctx.report(f"profile of {site.weight} ({number + 1}/{len(sites)})")
        matrix = site.matrices(program.tensor(site.weight).detach())[0]
        for plan in profile(
            site.weight, split, modes[site], matrix, metrics.moment([site]), ctx.seed
        ):
            cost = _price(program, site, plan, budget.name)
            given: Any = plan
            options.append(Option((site,), given, cost, plan.error * metrics.effect(site)))
    ctx.report(f"choosing among {len(options)} ways to split {len(sites)} layers")
    solve = choose_exact if exact else choose_greedy
    chosen = solve(thinned(options), budget.amount)
    found = Chosen(options=options)
    order = {site: place for place, site in enumerate(sites)}
    for option in sorted(chosen, key=lambda o: order[o.sites[0]]):
        picked: Any = option.plan
        if picked is not None:
            found.plans[option.sites[0]] = picked
    if (cost := cost_of(chosen)) > budget.amount:
        text = (
            f"asked for at most {amount_text(budget.name, budget.amount)} of {budget.name} in "
            f"these layers, but {amount_text(budget.name, cost)} is the least"
        )
        found.diagnostics.append(Diagnostic("warning", text))
    return found


def plans_of(
    name: str,
    split: NetworkSplit,
    modes: Modes,
    matrix: torch.Tensor,
    moment: torch.Tensor | None,
    seed: int,
) -> list[NetworkPlan]:
    """The plans of one matrix, by the options.

    Args:
        name: Of the parameter.
        split: The pass.
        modes: Factors of the axes.
        matrix: Shape (outs, ins).
        moment: Of the inputs.
        seed: As `network_plans` takes it.
    """
    del name
    return network_plans(
        matrix,
        moment,
        kinds=(split.kind,),
        damping=split.damping,
        modes=modes,
        most=split.bond,
        sweeps=split.sweeps,
        seed=seed,
    )


def _capped(split: NetworkSplit, bond: int) -> int:
    return bond if split.bond is None else min(bond, split.bond)


def _budget(split: NetworkSplit, program: Program, sites: Sequence[Site]) -> LayerBudget:
    return LayerBudget.of(program, sites, budget=split.budget, share=split.share, where=split.name)


def _price(program: Program, site: Site, plan: NetworkPlan, name: str) -> float:
    """What a plan costs in the unit of the budget."""
    if name == "flops":
        return float(sum(least_flops(plan, rows_of(program, site, call)) for call in site.calls))
    width = program.tensor(site.weight).element_size() if name == "bytes" else 1
    return float(plan.parameters * width)
