"""Which branches to erase: the lowest scores first, as long as what is left is a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torchlathe.passes.analysis.branches import Branch
from torchlathe.passes.rewrite.branches.liveness import Liveness

__all__ = ["Aim", "Chosen", "choose_branches", "per_cost"]


@dataclass(frozen=True)
class Aim:
    """How much is to be erased.

    Attributes:
        measure: What is counted.
        amount: How much of it is to go.
        reach: Whether at least so much has to go; else as close to it as may be.
    """

    measure: Literal["parameters", "flops", "count"]
    amount: float
    reach: bool = False

    def of(self, cost: tuple[int, int]) -> int:
        """What a branch that costs so many parameters and FLOPs counts."""
        return {"parameters": cost[0], "flops": cost[1], "count": 1}[self.measure]


@dataclass(frozen=True)
class Chosen:
    """What `choose_branches` found.

    Attributes:
        branches: In the order in which they were taken.
        erased: How much of what the aim counts goes with them.
        refused: Why others that scored lower than some of these have to stay, by branch.
    """

    branches: tuple[Branch, ...]
    erased: float
    refused: Mapping[Branch, str]


def choose_branches(
    liveness: Liveness, scores: Mapping[Branch, float], aim: Aim, keep: int = 0
) -> Chosen:
    """Take branches out, lowest score first, until the aim is met.

    One that would lead further past the aim than it is short of it now is passed over; where the
    aim has to be reached, the smallest of these that reaches it is taken in the end.

    Args:
        liveness: Of the whole program; changed.
        scores: Per branch that may go; infinite ones stay.
        aim: How much to erase.
        keep: Branches to leave.
    """
    order = sorted((b for b in scores if math.isfinite(scores[b])), key=scores.__getitem__)
    refused: dict[Branch, str] = {}
    passed: list[Branch] = []
    erased = 0.0
    for branch in order:
        if erased >= aim.amount:
            break
        cost = _cost(branch, liveness, scores, keep)
        if isinstance(cost, str):
            refused[branch] = cost
        elif aim.of(cost) - (aim.amount - erased) > aim.amount - erased:
            passed.append(branch)
        else:
            liveness.take(branch)
            erased += aim.of(cost)
    while aim.reach and erased < aim.amount and passed:
        costs = {b: c for b in passed if not isinstance(c := _cost(b, liveness, scores, keep), str)}
        if not costs:
            break
        short = aim.amount - erased
        enough = {b: c for b, c in costs.items() if aim.of(c) >= short} or costs
        best = min(enough, key=lambda b: aim.of(enough[b]))
        liveness.take(best)
        erased += aim.of(costs[best])
        passed.remove(best)
    return Chosen(tuple(liveness.taken), erased, refused)


def _cost(
    branch: Branch, liveness: Liveness, scores: Mapping[Branch, float], keep: int
) -> tuple[int, int] | str:
    found = liveness.cost_of(branch)
    if isinstance(found, str) or not keep:
        return found
    gone = set(liveness.dead) | set(branch.nodes)
    if sum(b.exit not in gone for b in scores) < keep:
        return f"{keep} branches are to stay"
    return found


def per_cost(
    scores: Mapping[Branch, float], liveness: Liveness, aim: Aim, branches: Sequence[Branch]
) -> dict[Branch, float]:
    """Scores over what each branch counts by itself: what is lost for each unit that is saved."""
    found = {}
    for branch in branches:
        cost = liveness.cost_of(branch)
        saved = 0 if isinstance(cost, str) else aim.of(cost)
        found[branch] = scores[branch] / saved if saved else math.inf
    return found
