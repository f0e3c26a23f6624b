"""Whether the passes of a pipeline can run in their order, decided before any of them runs.

An order is refused, never changed: the user wrote it, and a report must show what ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchlathe.ir import PreconditionError, Program
from torchlathe.passes.base import Fact, Pass, RewritePass

__all__ = ["check_order"]

Holds = Callable[[type[Fact]], bool]


def check_order(passes: Sequence[Pass], program: Program) -> None:
    """Check that each fact that a pass needs will hold when its turn comes.

    A fact holds if it is true of the program, or an earlier pass provides it, unless a pass in
    between breaks it.

    Raises:
        PreconditionError: One does not; the message names the pass, the fact and a legal order.
    """
    known: dict[type[Fact], bool] = {}

    def holds(fact: type[Fact]) -> bool:
        if fact not in known:
            known[fact] = fact.holds(program)
        return known[fact]

    problem = _first_problem(passes, holds)
    if problem is None:
        return
    index, fact = problem
    raise PreconditionError(
        f'pass {index + 1}, {passes[index]}, needs "{fact.name}", which does not hold there: '
        + _reason(passes[:index], fact),
        hint=_advice(passes, index, fact, holds),
    )


def _first_problem(passes: Sequence[Pass], holds: Holds) -> tuple[int, type[Fact]] | None:
    changed: dict[type[Fact], bool] = {}
    for index, item in enumerate(passes):
        if not isinstance(item, RewritePass):
            continue
        for fact in item.needs:
            if not (changed[fact] if fact in changed else holds(fact)):
                return index, fact
        changed.update(dict.fromkeys(item.breaks, False))
        changed.update(dict.fromkeys(item.provides, True))
    return None


def _reason(earlier: Sequence[Pass], fact: type[Fact]) -> str:
    breaking = [i for i in earlier if isinstance(i, RewritePass) and fact in i.breaks]
    if breaking:
        return f"{breaking[-1]} breaks it"
    return "it is not true of the program, and no pass before provides it"


def _advice(passes: Sequence[Pass], index: int, fact: type[Fact], holds: Holds) -> str:
    # Each single move, the shortest first.
    moves = [(i, j) for i in range(len(passes)) for j in range(len(passes)) if i != j]
    for source, target in sorted(moves, key=lambda move: abs(move[0] - move[1])):
        order = list(passes)
        order.insert(target, order.pop(source))
        if _first_problem(order, holds) is None:
            return f"a legal order is {','.join(map(str, order))}"
    return f'put a pass that provides "{fact.name}" before {passes[index]}, or leave that out'
