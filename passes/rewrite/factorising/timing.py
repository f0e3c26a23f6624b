"""How long layers take as they are and split, by the table of measured ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.cost.calls import value_of
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.ir.extents import as_int, example_sizes
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.quantities import quantity
from torchlathe.passes.rewrite.allocation.budgets import UNITS
from torchlathe.passes.rewrite.factorising.budget import LayerBudget, left_for_layers
from torchlathe.passes.rewrite.factorising.making import Factors
from torchlathe.passes.rewrite.factorising.networks import blank_cores, write_any
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site, find_sites

__all__ = ["Timed", "blank", "seconds_of", "slower", "table_for"]

Report = Callable[[str], None]


def table_for(program: Program) -> LatencyTable:
    """The table of the device that a program's tensors are on."""
    entries = program.entries.values()
    return LatencyTable(next((entry.tensor.device for entry in entries), torch.device("cpu")))


@dataclass
class Timed:
    """Seconds of a program's layers, dense and by plan, and of the whole.

    A plan is timed by writing it, with zeros for weights, into a copy of the program. Plans of
    layers of one shape are timed once.

    Attributes:
        program: Left as it is.
        table: Of its device.
        report: Called with what is being done.
        spent: Seconds of the calls of each site.
        factor: Measured seconds of the whole program over the sum of its ops.
        rest: Seconds of all other ops.
        whole: Measured seconds of the whole program.
    """

    program: Program
    table: LatencyTable
    report: Report
    spent: dict[Site, float] = field(default_factory=dict)
    factor: float = 1.0
    rest: float = 0.0
    whole: float = 0.0
    _known: dict[tuple[Any, ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, sites: Sequence[Site], report: Report) -> Timed:
        """Measure a program and its layers as they are."""
        report("latency: measuring the program and its ops")
        timed = cls(program, table_for(program), report)
        found = timed.table.program(program)
        timed.spent = {site: sum(found.nodes[c.name] for c in site.calls) for site in sites}
        timed.rest = found.seconds - sum(timed.spent.values())
        (timed.whole,) = timed.table.whole(program)
        timed.factor = timed.whole / max(found.seconds, 1e-12)
        return timed

    def budget(self, asked: float | str, where: str) -> LayerBudget:
        """What the layers may take, in seconds of the sum of ops.

        Raises:
            OptionError: The rest of the program takes more than the whole may.
        """
        most = quantity(asked, UNITS["latency"], name="latency", where=where).of(self.whole)
        layers = sum(self.spent.values())
        kept, everything = most / self.factor, self.rest + layers
        amount = left_for_layers("latency", asked, kept, everything, layers, where)
        return LayerBudget("latency", amount, layers, self.spent, self.price)

    def learn(self, plans: Iterable[Plan]) -> None:
        """Time plans, as many at once as are about different layers."""
        new = {self._key(plan): plan for plan in plans}
        rounds = list(_rounds([plan for key, plan in new.items() if key not in self._known]))
        for number, batch in enumerate(rounds):
            self.report(f"latency: ways to split, {number + 1}/{len(rounds)}")
            copy, calls = self._written(batch)
            names = set(itertools.chain.from_iterable(calls))
            nodes = self.table.program(copy, only=names).nodes
            for plan, own in zip(batch, calls, strict=True):
                self._known[self._key(plan)] = sum(nodes.get(name, 0.0) for name in own)

    def price(self, plan: Plan) -> float:
        """Seconds of the calls that stand for a plan's sites; `learn` first."""
        return self._known[self._key(plan)]

    def measure(self, plans: Sequence[Plan]) -> float:
        """Seconds of the whole program with all of these, in turn with the program as it is."""
        self.report("latency: measuring the candidate")
        copy, _ = self._written(plans)
        before, after = self.table.whole(self.program, copy)
        return after * self.whole / max(before, 1e-12)

    def _written(self, plans: Sequence[Plan]) -> tuple[Program, list[list[str]]]:
        """A copy with these plans, and the names of the calls of each."""
        copy = self.program.copy()
        theirs = {site.weight: site for site in find_sites(copy)[0]}
        nodes = []
        with copy.edit(by="latency") as edit:
            for plan in plans:
                sites = tuple(theirs[site.weight] for site in plan.sites)
                moved = replace(plan, sites=sites)
                nodes.append(write_any(edit, moved, blank(moved, copy)))
        return copy, [[node.name for node in own] for own in nodes]

    def _key(self, plan: Plan) -> tuple[Any, ...]:
        """What the time of a plan depends on."""
        sizes = example_sizes(self.program)
        layers = []
        for site in plan.sites:
            calls = tuple((str(c.target), _shape(site.operand(c), sizes)) for c in site.calls)
            dtype = self.program.tensor(site.weight).dtype
            layers.append((site.kind, site.shape, site.groups, calls, dtype, site.biased))
        legs = None if plan.network is None else plan.network.legs
        return (plan.form, legs, plan.ranks, plan.kept, *layers)


def _rounds(plans: Sequence[Plan]) -> Iterator[list[Plan]]:
    """Plans in as few batches as can be in which each site is once."""
    left = list(plans)
    while left:
        batch: list[Plan] = []
        taken: set[Site] = set()
        rest = []
        for plan in left:
            if taken.isdisjoint(plan.sites):
                batch.append(plan)
                taken.update(plan.sites)
            else:
                rest.append(plan)
        yield batch
        left = rest


def blank(plan: Plan, program: Program) -> Factors:
    """Factors of a plan with zeros in them."""
    if plan.network is not None:
        return blank_cores(plan, program)
    first = plan.sites[0]
    like = program.tensor(first.weight)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    none = (None,) * len(plan.sites)
    rank, ones = plan.ranks[0], [1] * len(first.kernel)
    if plan.form != "matrix":
        return Factors(*_blank_kernels(plan, zeros), none, 0.0)
    left = [site.outs - plan.kept for site in plan.sites]
    down: tuple[int, ...] = (rank, first.ins)
    ups: list[tuple[int, ...]] = [(outs, rank) for outs in left]
    rows: tuple[int, ...] = (plan.kept, first.ins)
    if first.kind == "experts":
        down, rows = (first.groups, *down), (first.groups, *rows)
        ups = [(first.groups, *up) for up in ups]
    elif first.kind == "convolution":
        down = (rank * first.groups, *first.shape[1:])
        ups = [(outs * first.groups, rank, *ones) for outs in left]
        rows = (plan.kept, *first.shape[1:])
    own = tuple(zeros(*up) for up in ups)
    if not plan.kept:
        return Factors((zeros(*down),), own, none, 0.0)
    order = torch.arange(first.outs, dtype=torch.int32, device=like.device)
    return Factors((zeros(*down),), own, none, 0.0, zeros(*rows), order)


def _blank_kernels(
    plan: Plan, zeros: Callable[..., torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    site = plan.sites[0]
    outs, ins, *kernel = site.shape
    ones, rank = [1] * len(kernel), plan.ranks[0]
    if plan.form == "spatial":
        return (zeros(rank, ins, kernel[0], 1),), (zeros(outs, rank, 1, kernel[1]),)
    if plan.form == "cp":
        return (zeros(rank, ins, *ones), zeros(rank, 1, *kernel)), (zeros(outs, rank, *ones),)
    last = plan.ranks[1]
    return (zeros(rank, ins, *ones), zeros(last, rank, *kernel)), (zeros(outs, last, *ones),)


# -- after the split ---------------------------------------------------------------------------


def seconds_of(sites: Sequence[Site], program: Program, table: LatencyTable) -> dict[Site, float]:
    """What the calls of each site take."""
    nodes = table.program(program, only={c.name for site in sites for c in site.calls}).nodes
    return {site: sum(nodes.get(c.name, 0.0) for c in site.calls) for site in sites}


def slower(
    program: Program,
    done: Sequence[tuple[Plan, list[fx.Node]]],
    before: Mapping[Site, float],
    table: LatencyTable,
) -> Iterator[Diagnostic]:
    """The layers whose calls take longer than what they stand for, by the rows of their input.

    Args:
        program: With the splits.
        done: Each plan with the calls that stand for its sites.
        before: Seconds of each site as it was.
        table: That those are from.
    """
    names = {node.name for _, nodes in done for node in nodes}
    found = table.program(program, only=names).nodes
    sizes = example_sizes(program)
    slow: dict[int, list[str]] = {}
    for plan, nodes in done:
        dense = sum(before[site] for site in plan.sites)
        split = sum(found.get(node.name, 0.0) for node in nodes)
        if split > dense > 0:
            last = next(node for node in reversed(nodes) if _is_last(node, nodes))
            name = plan.sites[0].weight
            rows = _rows(last, plan.sites[0], sizes)
            slow.setdefault(rows, []).append(f"{name} ({split / dense:.1f}x)")
    threads = torch.get_num_threads()
    where = f"{table.device.type}, {threads} thread{'s' if threads > 1 else ''}"
    for rows, layers in slow.items():
        yield Diagnostic(
            "warning",
            f"{len(layers)} of {len(done)} splits do not pay in time: with {rows:,} rows of input "
            f"({where}, by the table of measured ops) they take so many times as long as before: "
            + ", ".join(layers),
        )


def _is_last(node: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    return not any(node in other.all_input_nodes for other in nodes)


def _rows(node: fx.Node, site: Site, sizes: Mapping[Any, int]) -> int:
    """Positions of a result: all extents but that of the features."""
    shape = _shape(node, sizes)
    axis = 1 if site.kind == "convolution" and len(shape) > 2 else len(shape) - 1
    count = 1
    for place, extent in enumerate(shape):
        count *= 1 if place == axis else extent
    return count


def _shape(node: fx.Node, sizes: Mapping[Any, int]) -> tuple[int, ...]:
    shape: tuple[Any, ...] = value_of(node.meta["val"]).shape
    return tuple(as_int(e, sizes) if hasattr(e, "free_symbols") else e for e in shape)
