"""What layers cost as they are and split, in the unit of a budget, and what they may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchlathe.ir import OptionError, Program
from torchlathe.passes.quantities import quantity
from torchlathe.passes.rewrite.allocation.budgets import UNITS, whole_costs
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.writing import strides

__all__ = ["LayerBudget", "amount_text", "left_for_layers"]


@dataclass(frozen=True)
class LayerBudget:
    """What some layers together may cost, and what each costs, in one unit.

    Attributes:
        name: ``"params"``, ``"bytes"``, ``"flops"`` or ``"latency"``.
        amount: What all of them may cost.
        whole: What they cost as they are.
        spent: What each costs as it is.
        price: What a plan costs.
    """

    name: str
    amount: float
    whole: float
    spent: Mapping[Site, float]
    price: Callable[[Plan], float]

    @classmethod
    def of(
        cls,
        program: Program,
        sites: Sequence[Site],
        *,
        budget: tuple[str, float | str] | None = None,
        share: float | None = None,
        where: str,
    ) -> LayerBudget:
        """The budget of layers under one of the whole model, or for a share of them.

        Args:
            program: What is to be split.
            sites: The layers.
            budget: Name and amount, of the whole model; latency is for `timing`.
            share: Of the parameters of the layers, where there is no budget; by default half.
            where: Name of the pass, for messages.

        Raises:
            OptionError: The budget is below what the pass leaves alone.
        """
        name, asked = budget or ("params", 1.0)
        spent, price = _prices(program, sites, name)
        whole = sum(spent.values())
        if budget is None:
            return cls(name, (0.5 if share is None else share) * whole, whole, spent, price)
        everything = whole_costs(program, [name])[name]
        kept = quantity(asked, UNITS[name], name=name, where=where).of(everything)
        return cls(
            name, left_for_layers(name, asked, kept, everything, whole, where), whole, spent, price
        )

    @property
    def share(self) -> float:
        """Of what the layers cost, how much they may."""
        return self.amount / self.whole if self.whole else 1.0


def left_for_layers(
    name: str, asked: float | str, kept: float, everything: float, layers: float, where: str
) -> float:
    """What layers may cost, if a program that costs ``everything`` may cost ``kept``.

    Raises:
        OptionError: Nothing is left for them.
    """
    amount = kept - (everything - layers)
    if amount <= 0:
        raise OptionError(
            f"{name}={asked} leaves {amount_text(name, kept)}, "
            f"but what the pass does not split takes {amount_text(name, everything - layers)}",
            where=where,
            hint="give a larger one, name more layers, or set share, which counts only the "
            "layers that are split",
        )
    return amount


def amount_text(name: str, amount: float) -> str:
    """For messages: ``1,234B``, ``2.3 ms``."""
    return f"{amount * 1e3:.3g} ms" if name == "latency" else f"{amount:,.0f}{UNITS[name].symbol}"


def _prices(
    program: Program, sites: Sequence[Site], name: str
) -> tuple[dict[Site, float], Callable[[Plan], float]]:
    """What each site costs, and what a plan does."""
    if name == "flops":
        nodes = program.cost().at().nodes
        spent = {site: float(sum(nodes[c.name].flops for c in site.calls)) for site in sites}

        def by_flops(plan: Plan) -> float:
            first = plan.sites[0]
            if plan.network is not None:
                rows = spent[first] / (2 * first.outs * first.ins)
                return rows * plan.network.flops
            return plan.parameters * spent[first] / first.parameters * _positions(plan)

        return spent, by_flops
    width = {
        site: program.tensor(site.weight).element_size() if name == "bytes" else 1 for site in sites
    }

    def by_size(plan: Plan) -> float:
        first = plan.sites[0]
        places = 4 * first.outs if plan.kept and name == "bytes" else 0
        return float(plan.parameters * width[first] + places)

    return {site: float(site.parameters * w) for site, w in width.items()}, by_size


def _positions(plan: Plan) -> float:
    """How many more positions the first factors see than the result has, on the average."""
    if plan.form == "matrix":
        return 1.0
    site = plan.sites[0]
    steps = strides(site)
    if plan.form == "spatial":
        first = plan.ranks[0] * site.shape[1] * site.shape[2]
        return 1 + (steps[1] - 1) * first / plan.parameters
    return 1 + (math.prod(steps) - 1) * plan.ranks[0] * site.shape[1] / plan.parameters
