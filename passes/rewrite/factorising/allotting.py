"""From what the options ask for to a plan for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from torchlathe.ir import OptionError, Program
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.quantities import quantity
from torchlathe.passes.rewrite.allocation.budgets import UNITS, whole_costs
from torchlathe.passes.rewrite.factorising.choosing import (
    Option,
    choose_exact,
    choose_greedy,
    cost_of,
    thinned,
)
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.plans import Form, Plan, most_rank, plan_of, plans
from torchlathe.passes.rewrite.factorising.sensitivity import Effects, output_weights
from torchlathe.passes.rewrite.factorising.sites import Site, same_input
from torchlathe.passes.rewrite.factorising.splits import rank_for

__all__ = ["Allotment", "Wanted", "allot", "uniform"]


@dataclass(frozen=True)
class Wanted:
    """What is asked for: the options of a pass that splits.

    Attributes:
        where: Name of the pass, for messages.
        method: The norm, or ``"mixed"``.
        forms: Of factors that may be chosen, the first for layers that get no choice.
        budget: ``"params"``, ``"bytes"`` or ``"flops"`` of the whole model, with the amount; None
            where ``share`` or ``rank`` says how much.
        share: Of the parameters of the layers.
        rank: Of every layer.
        joint: Whether layers that read the same input share a factor.
        damping: As `splits.split` takes it.
        weigh: ``"output"`` or ``"layer"``: whose errors are to be small in sum.
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


@dataclass
class Allotment:
    """A plan for each layer that is split, in order of execution, and what to tell about it.

    Attributes:
        plans: The plans.
        metrics: The norms that they are to be made in.
        diagnostics: What to tell.
    """

    plans: list[Plan]
    metrics: Metrics
    diagnostics: list[Diagnostic] = field(default_factory=list)


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
    share = None if wanted.rank else _Budget.of(wanted, program, sites).share
    method = wanted.method
    found = []
    for group in _groups(sites, joint=wanted.joint):
        form = _form(group, wanted.forms[0])
        rank = wanted.rank or rank_within(group, form, share or 0.0)
        plan = plan_of(group, method, form, min(rank, _full(group)))
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

    Raises:
        OptionError: The budget is below what the pass leaves alone.
    """
    budget = _Budget.of(wanted, program, sites)
    if wanted.weigh == "output":
        known = "svd" if wanted.method == "svd" else "whitened-svd"
        found = effects(program, ctx, sites, metrics, known, wanted.damping)
        metrics = replace(metrics, effects=found)
    options = list(_options(wanted, program, ctx, sites, metrics, budget))
    solve = choose_exact if how == "exact" else choose_greedy
    ctx.report(f"choosing among {len(options)} ways to split {len(sites)} layers")
    chosen = solve(thinned(options), budget.amount)
    order = {site: i for i, site in enumerate(sites)}
    picked = [option.plan for option in chosen if option.plan is not None]
    allotted = Allotment(sorted(picked, key=lambda plan: order[plan.sites[0]]), metrics)
    if (cost := cost_of(chosen)) > budget.amount:
        unit = UNITS[budget.name].symbol
        text = (
            f"asked for at most {budget.amount:,.0f}{unit} of {budget.name} in these layers, but "
            f"{cost:,.0f}{unit} is the least"
        )
        allotted.diagnostics.append(Diagnostic("warning", text))
    return allotted


def rank_within(sites: Sequence[Site], form: Form, share: float) -> int:
    """The largest rank at which the factors hold at most this share of the parameters."""
    first = sites[0]
    if form == "matrix" and first.groups == 1:
        return rank_for(sum(site.outs for site in sites), first.ins, share)
    # `most_rank` divides the whole by what one rank takes.
    whole = sum(site.parameters for site in sites)
    most = max(most_rank(sites, form), 1)
    one = plan_of(sites, "svd", form, 1)
    each = whole / most if one is None or form == "tucker" else one.parameters
    return int(share * whole / each)


def _options(
    wanted: Wanted,
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    metrics: Metrics,
    budget: _Budget,
) -> Iterator[Option]:
    mixed = wanted.method == "mixed"
    # Where nothing is known of the data, the whitened split is the plain one.
    methods = ("whitened-svd", "svd") if mixed else (wanted.method,)
    joint = [g for g in same_input(sites) if len({s.weight for s in g}) == len(g)]
    together = {site for group in joint for site in group} if wanted.joint and not mixed else set()
    for number, site in enumerate(sites):
        ctx.report(f"profile of {site.weight} ({number + 1}/{len(sites)})")
        yield Option((site,), None, budget.dense(site), 0.0)
        if site in together:
            continue
        forms = wanted.forms if mixed else (_form([site], wanted.forms[0]),)
        for plan in plans([site], methods, forms, program, metrics, wanted.damping):
            yield _option(plan, budget, metrics)
    for group in joint if mixed or wanted.joint else ():
        ctx.report(f"profile of {', '.join(site.weight for site in group)} together")
        for plan in plans(group, methods[:1], ("matrix",), program, metrics, wanted.damping):
            yield _option(plan, budget, metrics)


def _option(plan: Plan, budget: _Budget, metrics: Metrics) -> Option:
    loss = plan.error * metrics.effect(*plan.sites)
    return Option(plan.sites, plan, budget.split(plan), loss)


def _groups(sites: Sequence[Site], *, joint: bool) -> list[tuple[Site, ...]]:
    if not joint:
        return [(site,) for site in sites]
    grouped = {group[0]: group for group in same_input(sites)}
    followers = {site for group in grouped.values() for site in group[1:]}
    return [grouped.get(site, (site,)) for site in sites if site not in followers]


def _form(sites: Sequence[Site], wanted: Form) -> Form:
    """The form where it fits, else the plain one."""
    kernel = sites[0].kernel
    if sites[0].groups > 1 or all(k == 1 for k in kernel):
        return "matrix"
    if wanted == "spatial" and (len(kernel) != 2 or 1 in kernel):
        return "matrix"
    return wanted


def _full(sites: Sequence[Site]) -> int:
    return min(sum(site.outs for site in sites), sites[0].ins)


def _too_small(site: Site) -> str:
    return (
        "the share is less than that of rank 1"
        if site.groups == 1
        else ("its groups are too small for any rank")
    )


@dataclass(frozen=True)
class _Budget:
    """What the layers together may cost, and what each costs, in one unit.

    Attributes:
        name: ``"params"``, ``"bytes"`` or ``"flops"``.
        amount: What all layers may cost.
        whole: What they cost as they are.
        spent: What the calls of each site cost as they are.
        width: Bytes of an element of each site.
        rows: Rows that a site that is looked up gives.
    """

    name: str
    amount: float
    whole: float
    spent: dict[Site, float]
    factor: dict[Site, float]

    @classmethod
    def of(cls, wanted: Wanted, program: Program, sites: Sequence[Site]) -> _Budget:
        name, asked = wanted.budget or ("params", 1.0)
        spent, factor = _spent(program, sites, name)
        whole = sum(spent.values())
        if wanted.budget is None:
            share = 0.5 if wanted.share is None else wanted.share
            return cls(name, share * whole, whole, spent, factor)
        everything = whole_costs(program, [name])[name]
        kept = quantity(asked, UNITS[name], name=name, where=wanted.where).of(everything)
        amount = kept - (everything - whole)
        if amount <= 0:
            unit = UNITS[name].symbol
            raise OptionError(
                f"{name}={asked} leaves {kept:,.0f}{unit}, "
                f"but what the pass does not split takes {everything - whole:,.0f}{unit}",
                where=wanted.where,
                hint="give a larger one, name more layers, or set share, which counts only the "
                "layers that are split",
            )
        return cls(name, amount, whole, spent, factor)

    @property
    def share(self) -> float:
        """Of what the layers cost, how much they may."""
        return self.amount / self.whole if self.whole else 1.0

    def dense(self, site: Site) -> float:
        """What a site costs as it is."""
        return self.spent[site]

    def split(self, plan: Plan) -> float:
        """What a plan costs."""
        first = plan.sites[0]
        return plan.parameters * self.factor[first] * _strided(plan, self.name)


def _spent(
    program: Program, sites: Sequence[Site], name: str
) -> tuple[dict[Site, float], dict[Site, float]]:
    """What each site costs, and what each parameter of its factors would."""
    if name != "flops":
        width = {
            site: program.tensor(site.weight).element_size() if name == "bytes" else 1
            for site in sites
        }
        return {site: site.parameters * w for site, w in width.items()}, dict(width)
    nodes = program.cost().at().nodes
    spent = {site: float(sum(nodes[c.name].flops for c in site.calls)) for site in sites}
    return spent, {site: spent[site] / site.parameters for site in sites}


def _strided(plan: Plan, name: str) -> float:
    """How many more positions the first factors see than the result has, on the average."""
    if name != "flops" or plan.form == "matrix":
        return 1.0
    from torchlathe.passes.rewrite.factorising.writing import strides

    site = plan.sites[0]
    steps = strides(site)
    if plan.form == "spatial":
        first = plan.ranks[0] * site.shape[1] * site.shape[2]
        return 1 + (steps[1] - 1) * first / plan.parameters
    area = 1.0
    for step in steps:
        area *= step
    return 1 + (area - 1) * plan.ranks[0] * site.shape[1] / plan.parameters
