"""Which plan for which site, under one budget: a multiple-choice knapsack.

Two solvers: the exact one by mixed-integer programming, and one by equal slope (Lagrangian
relaxation), which is exact on the convex hull of the profiles and takes linear time.

Source: own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site

__all__ = ["Option", "choose_exact", "choose_greedy", "cost_of", "loss_of", "thinned"]


@dataclass(frozen=True, eq=False)
class Option:
    """One choice for one site, or for several together.

    Attributes:
        sites: Which sites it decides.
        plan: How they are split; None to leave them dense.
        cost: In the unit of the budget.
        loss: What is to be small in sum.
    """

    sites: tuple[Site, ...]
    plan: Plan | None
    cost: float
    loss: float


def cost_of(chosen: Sequence[Option]) -> float:
    """Sum of the costs."""
    return sum(option.cost for option in chosen)


def loss_of(chosen: Sequence[Option]) -> float:
    """Sum of the losses."""
    return sum(option.loss for option in chosen)


def thinned(options: Sequence[Option]) -> list[Option]:
    """Options without those that another one for the same sites beats in cost and loss."""
    kept: list[Option] = []
    best: dict[tuple[Site, ...], float] = {}
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if option.loss < best.get(option.sites, float("inf")):
            best[option.sites] = option.loss
            kept.append(option)
    return kept


def choose_exact(
    options: Sequence[Option],
    budget: float,
    *,
    also: Sequence[tuple[Mapping[Option, float], float]] = (),
    seconds: float = 60.0,
) -> list[Option]:
    """The choice of least loss within the budget.

    Args:
        options: Every site must have one of its own, or be in one with others.
        budget: Most that the choice may cost; if nothing fits, the cheapest choice is returned.
        also: Further budgets: what each option costs there, and the most that all may. If nothing
            fits them all, nothing is returned.
        seconds: Limit for the solver, which gives the best that it has then.
    """
    import numpy
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    fallback = choose_greedy(options, budget)
    if cost_of(fallback) > budget:
        return [] if also else fallback
    if also and not _within(fallback, also):
        fallback = []
    sites = list(dict.fromkeys(site for option in options for site in option.sites))
    place = {site: row for row, site in enumerate(sites)}
    entries = [(place[site], column) for column, o in enumerate(options) for site in o.sites]
    rows, columns = zip(*entries, strict=True)
    shape = (len(sites), len(options))
    covers = csr_matrix((numpy.ones(len(entries)), (rows, columns)), shape=shape)
    scale = max(budget, 1e-300)
    rows_of_costs = [[option.cost / scale for option in options]]
    for prices, most in also:
        rows_of_costs.append([prices[option] / max(most, 1e-300) for option in options])
    costs = numpy.array(rows_of_costs)
    losses = numpy.array([option.loss for option in options])
    with _silent():
        found = milp(
            losses / max(float(losses.max(initial=0.0)), 1e-300),
            constraints=[LinearConstraint(covers, 1, 1), LinearConstraint(costs, -numpy.inf, 1.0)],
            integrality=numpy.ones(len(options), dtype=int),
            bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )
    if found.x is None:
        return fallback
    chosen = [option for option, taken in zip(options, found.x, strict=True) if taken > 0.5]
    # The solver's tolerance may let it go over by a hair, and its time may be up.
    fits = cost_of(chosen) <= budget and _within(chosen, also)
    better = not fallback or loss_of(chosen) <= loss_of(fallback)
    return chosen if fits and better else fallback


def _within(chosen: Sequence[Option], also: Sequence[tuple[Mapping[Option, float], float]]) -> bool:
    return all(sum(prices[o] for o in chosen) <= most * (1 + 1e-9) for prices, most in also)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hold back what compiled code prints: the solver does so past Python's own stream."""
    try:
        sys.stdout.flush()
        kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    except (OSError, ValueError, AttributeError):  # there is no standard output
        yield
        return
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        # What is still in the buffer of the C library would be printed later.
        with contextlib.suppress(OSError, TypeError, AttributeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def choose_greedy(options: Sequence[Option], budget: float) -> list[Option]:
    """The choice at the steepest common slope that fits, then what still fits by itself.

    Args:
        options: As `choose_exact` takes them.
        budget: As there.
    """
    clusters = _clusters(options)

    def at(price: float) -> list[Option]:
        return [o for cluster in clusters for o in _cheapest(cluster, price)]

    free = at(0.0)
    if cost_of(free) <= budget:
        return free
    low, high = 0.0, 1.0
    most = max((option.loss for option in options), default=1.0)
    least = min((o.cost for o in options if o.cost > 0), default=1.0)
    while cost_of(at(high)) > budget and high < 1e6 * max(most, 1e-300) / least:
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        if cost_of(at(middle)) > budget:
            low = middle
        else:
            high = middle
    return _filled(at(high), clusters, budget)


def _clusters(options: Sequence[Option]) -> list[list[Option]]:
    """Options that decide about common sites, together; in the order of the sites."""
    leader: dict[Site, Site] = {}

    def find(site: Site) -> Site:
        while leader.setdefault(site, site) is not site:
            site = leader[site]
        return site

    for option in options:
        first = find(option.sites[0])
        for site in option.sites[1:]:
            leader[find(site)] = first
    found: dict[Site, list[Option]] = {}
    for option in options:
        found.setdefault(find(option.sites[0]), []).append(option)
    return list(found.values())


def _cheapest(cluster: Sequence[Option], price: float) -> list[Option]:
    """What a cluster takes where a unit of cost is worth this much loss: apart or together."""

    def value(option: Option) -> tuple[float, float]:
        return option.loss + price * option.cost, option.cost

    single: dict[Site, Option] = {}
    joint: Option | None = None
    for option in cluster:
        if len(option.sites) > 1:
            if joint is None or value(option) < value(joint):
                joint = option
        elif option.sites[0] not in single or value(option) < value(single[option.sites[0]]):
            single[option.sites[0]] = option
    apart = list(single.values())
    if joint is not None and value(joint)[0] < sum(value(option)[0] for option in apart):
        return [joint]
    return apart


def _filled(
    chosen: list[Option], clusters: Sequence[Sequence[Option]], budget: float
) -> list[Option]:
    """Better options for the same sites while they fit, the largest gain for its cost first."""
    spare = budget - cost_of(chosen)
    others: dict[tuple[Site, ...], list[Option]] = {}
    for cluster in clusters:
        for option in cluster:
            others.setdefault(option.sites, []).append(option)
    taken = {option.sites: option for option in chosen}
    while True:
        best: tuple[float, Option] | None = None
        for sites, now in taken.items():
            for option in others[sites]:
                gain, more = now.loss - option.loss, option.cost - now.cost
                if gain > 0 and more <= spare:
                    slope = gain / max(more, 1e-300)
                    if best is None or slope > best[0]:
                        best = slope, option
        if best is None:
            return list(taken.values())
        option = best[1]
        spare -= option.cost - taken[option.sites].cost
        taken[option.sites] = option
