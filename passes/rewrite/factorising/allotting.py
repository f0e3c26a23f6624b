"""From what the options ask for to a plan for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, get_args

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
from torchlathe.passes.rewrite.factorising.making import Factors
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.networks import Networks, plans_of_networks
from torchlathe.passes.rewrite.factorising.plans import (
    Form,
    Plan,
    can_keep_rows,
    fits,
    most_rank,
    plan_of,
)
from torchlathe.passes.rewrite.factorising.profiles import plans
from torchlathe.passes.rewrite.factorising.proving import changes_on_held_out
from torchlathe.passes.rewrite.factorising.remainders import kept_rows
from torchlathe.passes.rewrite.factorising.sensitivity import Effects, output_weights
from torchlathe.passes.rewrite.factorising.sites import Site, same_input
from torchlathe.passes.rewrite.factorising.splits import rank_for
from torchlathe.passes.rewrite.factorising.timing import Timed
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkKind

__all__ = ["Allotment", "Wanted", "allot", "rank_within", "uniform"]

# A choice that turns out too slow is made again with less, so many times.
_CORRECTIONS = 3
_NEAR = 1.02
# What a mixed choice is tried against, by labels of plans; and the same with all layers together
# that can be, which differs from the choice since the choice does not know how errors meet.
_TOGETHER = "whitened, joint wherever possible"
_FEWER = {
    "products": ("svd", "whitened-svd", "joint", "spatial", "tucker", "cp"),
    "whitened and joint": ("whitened-svd", "joint"),
    _TOGETHER: ("whitened-svd", "joint"),
    "whitened": ("whitened-svd",),
}

Solve: TypeAlias = Callable[[Sequence[Option], float], list[Option]]


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the options of a pass that splits.

    Attributes:
        where: Name of the pass, for messages.
        method: The norm, or ``"mixed"``.
        forms: Of factors that may be chosen, the first for layers that get no choice.
        budget: Name and amount of the budget of the whole model; None where ``share`` or ``rank``
            says how much.
        share: Of the parameters of the layers.
        rank: Of every layer.
        joint: Whether layers that read the same input share a factor.
        damping: As `splits.split` takes it.
        weigh: ``"output"`` or ``"layer"``: whose errors are to be small in sum.
        remainder: Share of the rows that are kept as they are.
        among: Labels of what ``"mixed"`` chooses among.
    """

    where: str
    method: str
    forms: tuple[Form, ...]
    budget: tuple[str, float | str] | None
    share: float | None
    rank: int | None
    joint: bool
    damping: float
    weigh: str = "output"
    remainder: float = 0.0
    among: tuple[str, ...] = ()

    def kept(self, sites: Sequence[Site]) -> int:
        """Rows of these sites that are kept."""
        alone = len(sites) == 1 and can_keep_rows(sites[0])
        return kept_rows(sites[0].outs, self.remainder) if alone else 0


@dataclass
class Allotment:
    """A plan for each layer that is split, in order of execution, and what to tell about it.

    Attributes:
        plans: The plans.
        metrics: The norms that they are to be made in.
        diagnostics: What to tell.
        options: What there was to choose from.
        made: Factors of plans that are known already.
    """

    plans: list[Plan]
    metrics: Metrics
    diagnostics: list[Diagnostic] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    made: dict[Plan, Factors] = field(default_factory=dict)


def uniform(
    wanted: Wanted,
    program: Program,
    sites: Sequence[Site],
    metrics: Metrics,
    left: dict[str, str],
) -> Allotment:
    """The same rank, or the same share of the parameters, for every layer.

    Args:
        wanted: The options.
        program: What is to be split.
        sites: Its layers.
        metrics: The norms that the layers are split in.
        left: Takes a reason for each layer that is left alone.

    Raises:
        OptionError: The budget is below what the pass leaves alone.
    """
    budget = None if wanted.rank else _budget(wanted, program, sites)
    method = wanted.method
    found = []
    for group in _groups(sites, joint=wanted.joint):
        form = _form(group, wanted.forms[0])
        kept = wanted.kept(group) if form == "matrix" else 0
        if budget is None:
            rank = wanted.rank or 0
        else:
            rank = rank_within(group, form, budget.share, kept=kept)
        most = rank if form == "cp" else min(rank, _full(group))
        plan = plan_of(group, method, form, most, kept=kept)
        # Strides and the places of kept rows are in the price, but not in the share.
        allowed = 0.0 if budget is None else budget.share * sum(budget.spent[s] for s in group)
        while plan is not None and budget is not None and budget.price(plan) > allowed:
            most -= 1
            plan = plan_of(group, method, form, most, kept=kept)
        if plan is not None:
            found.append(plan)
            continue
        reason = _too_small(group[0]) if rank < 1 else "its factors would not be smaller"
        left.update(dict.fromkeys((site.weight for site in group), reason))
    return Allotment(found, metrics)


def allot(
    wanted: Wanted,
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    metrics: Metrics,
    how: str,
    effects: Effects = output_weights,
    networks: Networks = plans_of_networks,
) -> Allotment:
    """The plans of least summed relative squared error within the budget.

    Args:
        wanted: The options.
        program: What is to be split.
        ctx: Where progress goes.
        sites: Its layers.
        metrics: The norms that errors are told in.
        how: ``"greedy"`` or ``"exact"``.
        effects: Measures what errors do to the outputs.
        networks: Fits networks of one kind to a layer.

    Raises:
        OptionError: The budget is below what the pass leaves alone.
    """
    timed: Timed | None = None
    if wanted.budget is not None and wanted.budget[0] == "latency":
        timed = Timed.of(program, sites, ctx.report)
        budget = timed.budget(wanted.budget[1], wanted.where)
    else:
        budget = _budget(wanted, program, sites)
    if wanted.weigh == "output":
        known = "svd" if wanted.method == "svd" else "whitened-svd"
        found = effects(program, ctx, sites, metrics, known, wanted.damping)
        metrics = replace(metrics, effects=found)
    ways = list(_ways(wanted, program, ctx, sites, metrics, networks))
    if timed is not None:
        timed.learn(ways)
    options = [Option((site,), None, budget.spent[site], 0.0) for site in sites]
    for plan in ways:
        loss = plan.error * metrics.effect(*plan.sites)
        options.append(Option(plan.sites, plan, budget.price(plan), loss))
    solve = choose_exact if how == "exact" else choose_greedy
    ctx.report(f"choosing among {len(options)} ways to split {len(sites)} layers")
    allotted = Allotment([], metrics, options=options)
    options = thinned(options)
    chosen = solve(options, budget.amount)
    if timed is not None:
        chosen = _fast_enough(timed, options, budget, solve, chosen, allotted.diagnostics)
    elif (cost := cost_of(chosen)) > budget.amount:
        text = (
            f"asked for at most {amount_text(budget.name, budget.amount)} of {budget.name} in "
            f"these layers, but {amount_text(budget.name, cost)} is the least"
        )
        allotted.diagnostics.append(Diagnostic("warning", text))
    if wanted.method == "mixed" and wanted.weigh == "output" and timed is None:
        chosen = _tried(wanted, program, ctx, budget, solve, chosen, allotted)
    order = {site: i for i, site in enumerate(sites)}
    allotted.plans = sorted(_plans(chosen), key=lambda plan: order[plan.sites[0]])
    return allotted


def _tried(
    wanted: Wanted,
    program: Program,
    ctx: PassContext,
    budget: LayerBudget,
    solve: Solve,
    chosen: list[Option],
    allotted: Allotment,
) -> list[Option]:
    """The choice, or that among fewer methods where it changes the outputs less."""
    candidates = {"all": chosen}
    for name, labels in _FEWER.items():
        fewer = [o for o in allotted.options if o.plan is None or o.plan.label in labels]
        if name == _TOGETHER:
            fewer = _together(fewer)
        found = solve(thinned(fewer), budget.amount)
        if cost_of(found) <= budget.amount and not any(
            set(_plans(found)) == set(_plans(other)) for other in candidates.values()
        ):
            candidates[name] = found
    if len(candidates) < 2:
        return chosen
    plans = [_plans(found) for found in candidates.values()]
    changes, made = changes_on_held_out(
        program, ctx, plans, allotted.metrics, wanted.method, wanted.damping
    )
    best = min(range(len(plans)), key=changes.__getitem__)
    allotted.made = {plan: made[plan] for plan in plans[best] if plan in made}
    told = ", ".join(f"{n} {c:.3g}" for n, c in zip(candidates, changes, strict=True))
    text = f"relative squared change of the outputs by what is chosen among: {told}"
    allotted.diagnostics.append(Diagnostic("note", text))
    return list(candidates.values())[best]


def _together(options: Sequence[Option]) -> list[Option]:
    """Without splits of one layer alone that could be split together with others."""
    grouped = {site for option in options if len(option.sites) > 1 for site in option.sites}
    return [o for o in options if len(o.sites) > 1 or o.plan is None or o.sites[0] not in grouped]


def _fast_enough(
    timed: Timed,
    options: Sequence[Option],
    budget: LayerBudget,
    solve: Solve,
    chosen: list[Option],
    diagnostics: list[Diagnostic],
) -> list[Option]:
    """The choice, corrected by how long the whole program really takes with it."""
    most = (budget.amount + timed.rest) * timed.factor
    amount, found = budget.amount, timed.measure(_plans(chosen))
    best = found, chosen
    for _ in range(_CORRECTIONS):
        if found <= most * _NEAR or cost_of(chosen) > amount:
            break
        amount -= (found - most) / timed.factor
        chosen = solve(options, max(amount, 0.0))
        found = timed.measure(_plans(chosen))
        best = min(best, (found, chosen), key=lambda pair: pair[0])
    found, chosen = best if found > most * _NEAR else (found, chosen)
    text = f"a run takes {found * 1e3:.3g} ms with these splits, and {timed.whole * 1e3:.3g} before"
    missed = found > most * _NEAR
    if missed:
        text = f"asked for a run of at most {most * 1e3:.3g} ms: {text}"
    diagnostics.append(Diagnostic("warning" if missed else "note", text))
    return chosen


def _plans(chosen: Sequence[Option]) -> list[Plan]:
    return [option.plan for option in chosen if option.plan is not None]


def rank_within(sites: Sequence[Site], form: Form, share: float, *, kept: int = 0) -> int:
    """The largest rank at which the factors hold at most this share of the parameters."""
    first = sites[0]
    if form == "matrix" and first.groups == 1 and not kept:
        return rank_for(sum(site.outs for site in sites), first.ins, share)
    # `most_rank` divides the whole by what one rank takes.
    whole = sum(site.parameters for site in sites)
    rows = kept * first.groups * first.ins
    most = max(most_rank(sites, form, kept=kept), 1)
    one = plan_of(sites, "svd", form, 1, kept=kept)
    each = (whole - rows) / most if one is None or form == "tucker" else one.parameters - rows
    return max(int((share * whole - rows) / each), 0)


def _budget(wanted: Wanted, program: Program, sites: Sequence[Site]) -> LayerBudget:
    where, share = wanted.where, wanted.share
    return LayerBudget.of(program, sites, budget=wanted.budget, share=share, where=where)


def _ways(
    wanted: Wanted,
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    metrics: Metrics,
    networks: Networks,
) -> Iterator[Plan]:
    """Every plan that there is to choose from, with its error."""
    mixed = wanted.method == "mixed"
    methods: Sequence[str] = (wanted.method,)
    remainders = {wanted.remainder}
    if mixed:
        # Where nothing is known of the data, the whitened split is the plain one.
        methods = [name for name in ("whitened-svd", "svd") if name in wanted.among]
        remainders.add(0.0)
    grouped = wanted.joint or (mixed and "joint" in wanted.among)
    joint = [g for g in same_input(sites) if len({s.weight for s in g}) == len(g)]
    together = {site for group in joint for site in group} if wanted.joint and not mixed else set()
    kinds: list[NetworkKind] = [kind for kind in get_args(NetworkKind) if kind in wanted.among]
    damping = wanted.damping
    for number, site in enumerate(sites):
        ctx.report(f"profile of {site.weight} ({number + 1}/{len(sites)})")
        if site in together:
            continue
        forms = wanted.forms if mixed else (_form([site], wanted.forms[0]),)
        yield from plans(
            [site], methods, forms, program, metrics, damping, remainders=sorted(remainders)
        )
        for kind in kinds if mixed else ():
            yield from networks(site, kind, program, metrics, damping)
    for group in joint if grouped else ():
        ctx.report(f"profile of {', '.join(site.weight for site in group)} together")
        shared = "svd" if wanted.method == "svd" else methods[0] if methods else "whitened-svd"
        yield from plans(group, (shared,), ("matrix",), program, metrics, damping)


def _groups(sites: Sequence[Site], *, joint: bool) -> list[tuple[Site, ...]]:
    if not joint:
        return [(site,) for site in sites]
    grouped = {group[0]: group for group in same_input(sites)}
    followers = {site for group in grouped.values() for site in group[1:]}
    return [grouped.get(site, (site,)) for site in sites if site not in followers]


def _form(sites: Sequence[Site], wanted: Form) -> Form:
    """The form where it fits, else the plain one."""
    return wanted if fits(sites[0], wanted) else "matrix"


def _full(sites: Sequence[Site]) -> int:
    return min(sum(site.outs for site in sites), sites[0].ins)


def _too_small(site: Site) -> str:
    return (
        "the share is less than that of rank 1"
        if site.groups == 1
        else ("its groups are too small for any rank")
    )
