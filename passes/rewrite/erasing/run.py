"""One run of structured erase: score, allocate, erase, and again for every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.ir import Program
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.passes.analysis.families import Families, Family, ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult
from torchlathe.passes.importance import comparable, scores
from torchlathe.passes.rewrite.allocation.budgets import (
    Goal,
    measures,
    shortfall,
    unit_costs,
    whole_costs,
)
from torchlathe.passes.rewrite.allocation.climbing import Allocation, Limit, climb, closest
from torchlathe.passes.rewrite.allocation.isomorphism import isomorphic_groups
from torchlathe.passes.rewrite.allocation.ladders import (
    Ladder,
    Scores,
    global_ladder,
    isomorphic_ladder,
    kept_by_share,
    local_ladder,
    lowest,
)
from torchlathe.passes.rewrite.allocation.latency_search import Found, LatencySearch
from torchlathe.passes.rewrite.allocation.sizes import Sizes
from torchlathe.passes.rewrite.compensating.compensation import Compensation
from torchlathe.passes.rewrite.erasing.choosing import writes
from torchlathe.passes.rewrite.erasing.measuring import error_notes
from torchlathe.passes.rewrite.erasing.schedules import Composition, train_between
from torchlathe.passes.rewrite.erasing.zeros import zero_units

if TYPE_CHECKING:
    from torchlathe.passes.rewrite.erasing.structured_erase import StructuredErase

__all__ = ["EraseRun"]

Units = dict[Family, torch.Tensor]


class EraseRun:
    """What happens between the options of `StructuredErase` and its result.

    Args:
        options: The pass.
        program: Changed in place.
        ctx: As the pass gets it.
    """

    def __init__(self, options: StructuredErase, program: Program, ctx: PassContext) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.floors = options.floors
        self.diagnostics: list[Diagnostic] = []
        self.statistics: dict[str, int | float | str] = {}
        self.exact = True
        self.trained = 0
        self.refitted = 0
        self._given = _given_scores(options.importance)
        self._search: LatencySearch | None = None
        self._found: Found | None = None
        self._kept: Mapping[Family, int] = {}
        self._prunable: dict[str, int] = {}
        self._extents: dict[str, int] = {}

    def run(self) -> PassResult:
        """Erase in steps, and say what was left alone and why."""
        options, program, ctx = self.options, self.program, self.ctx
        families = ctx.analysis(ZeroInvariantGroups)
        options.choice.check(families, options.name)
        chosen, self.diagnostics = options.choice.of(families)
        self._begin(families, chosen)
        done = Composition.of(program)
        for step in range(1, options.steps + 1):
            if options.steps > 1:
                ctx.report(f"step {step} of {options.steps}")
            if step > 1:
                families = ctx.analysis(ZeroInvariantGroups)
                chosen, _ = options.choice.of(families)
            units = self._units(families, chosen, step)
            units = {f: u for f, u in units.items() if len(u)}
            if units:
                self._erase(done, units)
            if options.between is not None and step < options.steps:
                self.trained += train_between(program, options.between, step, ctx.spec)
        return self._result(done)

    def _begin(self, families: Families, chosen: Sequence[Family]) -> None:
        """Note what there is before the first step."""
        program, options = self.program, self.options
        self.statistics = {
            "families": len(families),
            "prunable": len(families.prunable),
            "pinned": len(families.pinned),
        }
        parameters = program.parameters
        owned = {s.name for f in chosen for s in f.slices}
        self._prunable = {n: t.numel() for n, t in parameters.items() if n in owned}
        self._extents = {f.name: f.extent for f in chosen}
        wanted = options.budgets
        if not wanted:
            self.goal = Goal()
            return
        whole = whole_costs(program, wanted)
        if "latency" in wanted:
            self._search = LatencySearch(self._table(), self.ctx.report)
            whole["latency"] = self._search.begin(program)
        self.goal = Goal.of(wanted, whole, options.name)

    def _table(self) -> LatencyTable:
        if self.options.latency_table is not None:
            return self.options.latency_table
        tensors = (entry.tensor for entry in self.program.entries.values())
        return LatencyTable(next((t.device for t in tensors), torch.device("cpu")))

    # -- which units -------------------------------------------------------------------------

    def _units(self, families: Families, chosen: tuple[Family, ...], step: int) -> Units:
        if self.options.zeros:
            return zero_units(self.program, families, chosen, self.floors)
        if not chosen:
            self._kept = {}
            return {}
        importance: Any = self.options.importance if self._given is None else self._given
        scored = scores(self.program, families, chosen, importance, self.ctx)
        kept = self._allocate(families, scored, step)
        self._kept = kept
        return {f: lowest(score, kept[f]) for f, score in scored.items()}

    def _allocate(self, families: Families, scored: Scores, step: int) -> Mapping[Family, int]:
        """How many units each family keeps at this step."""
        options = self.options
        if isinstance(options.sparsity, Mapping):
            return kept_by_share(scored, self._shares(options.sparsity, scored, step), self.floors)
        sizes = Sizes(self.program, families, tuple(scored))
        ladder = self._ladder(families, scored, sizes)
        if not options.budgets:
            return closest(ladder, self._share_limit(sizes, step)).kept
        known = measures(sizes)
        limits = [
            Limit(name, self.goal.at(name, options.schedule, step), known[name])
            for name in options.budgets
            if name in known
        ]
        found = climb(ladder, limits, self.floors)
        if self._search is not None and not found.unmet:
            return self._fast_enough(ladder, found, scored, step)
        return found.kept

    def _ladder(self, families: Families, scored: Scores, sizes: Sizes) -> Ladder:
        options = self.options
        costs = unit_costs(sizes, scored, options.budgets) if options.cost_aware else None
        if options.scope == "local":
            return local_ladder(scored, self.floors)
        normalise = not comparable(options.importance)
        if options.scope == "isomorphic":
            groups = isomorphic_groups(scored, families)
            self.statistics["groups"] = len(groups)
            return isomorphic_ladder(scored, groups, self.floors, normalise=normalise, costs=costs)
        return global_ladder(scored, self.floors, normalise=normalise, costs=costs)

    def _shares(self, given: Mapping[str, float], scored: Scores, step: int) -> dict[Family, float]:
        """Per family, the share of the units that it has now to erase at this step."""
        ramp = self.options.schedule
        shares = {}
        for family in scored:
            keep = 1 - max(s for pattern, s in given.items() if writes(family, (pattern,)))
            now, before = (ramp.share(keep, n) if n else 1.0 for n in (step, step - 1))
            # A family is called otherwise if one beside it came down to a single unit.
            whole = self._extents.get(family.name, family.extent / before)
            shares[family] = 1 - round(whole * now) / family.extent
        return shares

    def _share_limit(self, sizes: Sizes, step: int) -> Limit:
        """A share of the prunable parameters that there were before the first step."""
        keep = self.options.schedule.share(1 - self._sparsity, step)
        whole = sum(self._prunable.values())
        gone = whole - self._prunable_now()
        return Limit("sparsity", sizes.prunable - (whole * (1 - keep) - gone), sizes.remaining)

    @property
    def _sparsity(self) -> float:
        given = self.options.sparsity
        assert not isinstance(given, Mapping)
        return 0.5 if given is None else given

    def _prunable_now(self) -> int:
        parameters = self.program.parameters
        return sum(parameters[n].numel() for n in self._prunable if n in parameters)

    def _fast_enough(
        self, ladder: Ladder, found: Allocation, scored: Scores, step: int
    ) -> Mapping[Family, int]:
        """Climb on until the program is fast enough, from where all other limits hold."""
        assert self._search is not None
        most = self.goal.at("latency", self.options.schedule, step)

        def kept(rung: int) -> dict[Family, int]:
            if rung == found.rung:
                return dict(found.kept)  # with what was given back there
            return dict(zip(ladder.families, ladder.kept(rung), strict=True))

        def units(rung: int) -> Units:
            return {f: lowest(scored[f], k) for f, k in kept(rung).items()}

        self._found = self._search.find(self.program, units, found.rung, ladder.rungs, most)
        return kept(self._found.rung)

    # -- erasing -----------------------------------------------------------------------------

    def _erase(self, done: Composition, units: Units) -> None:
        self.exact = self.exact and all(f.exactness != "approximate" for f in units)
        corrected = sum(f.exactness == "exact-after-correction" for f in units)
        known = int(self.statistics.get("corrected_families", 0))
        self.statistics["corrected_families"] = max(known, corrected)
        self.diagnostics += error_notes(self.program, units)
        self._given = _left(self._given, units)
        refit = Compensation(self.program, self.ctx, units) if self.options.compensate else None
        done.erase(self.program, units, self.ctx.spec)
        if refit is not None:
            self.refitted += sum(r.ridge is not None for r in refit.apply(self.program))

    # -- the result --------------------------------------------------------------------------

    def _result(self, done: Composition) -> PassResult:
        options, statistics = self.options, self.statistics
        statistics["erased_units"] = sum(done.units.values())
        statistics["erased_families"] = len(done.units)
        self._tell_shortfalls()
        if not done.units and not self.trained:
            statistics.pop("corrected_families", None)
            self.diagnostics.append(Diagnostic("warning", "there was nothing to erase"))
            return PassResult(False, statistics, self.diagnostics)
        if options.steps > 1:
            statistics["steps"] = options.steps
        exactness = Exactness.EXACT if self.exact else Exactness.APPROXIMATE
        reference = None if options.zeros else done.reference
        if self.refitted:
            statistics["refitted"] = self.refitted
            # Its error is measured against the program before, which it was fitted to.
            exactness, reference = Exactness.APPROXIMATE, None
        if self.trained:
            statistics["trained_tensors"] = self.trained
            exactness = Exactness.TRAINED
        # Refitted weights are held against the original, which they were fitted to.
        held = exactness is not Exactness.TRAINED and not options.zeros and not self.refitted
        reference = done.reference if held else None
        return PassResult(True, statistics, self.diagnostics, reference, exactness)

    def _tell_shortfalls(self) -> None:
        """Compare what was asked for with what there is now."""
        options = self.options
        owned = sum(self._prunable.values())
        pinned = f"the families that may be erased own {owned:,} parameters"
        reached = whole_costs(self.program, options.budgets)
        if self._search is not None:
            self._add_latency(reached)
        for name, value in reached.items():
            asked = self.goal.after[name]
            unit, scale, slack = ("_ms", 1e3, 1.05) if name == "latency" else ("", 1, 1)
            self.statistics[f"{name}_asked{unit}"] = asked * scale
            self.statistics[f"{name}_reached{unit}"] = value * scale
            if value > asked * slack:
                limit = Limit(name, asked, lambda _: 0.0)
                told = shortfall(limit, value, self._kept, self.floors, pinned)
                self.diagnostics.append(told)
        if not options.budgets and not options.zeros and not isinstance(options.sparsity, Mapping):
            self._tell_sparsity()

    def _add_latency(self, reached: dict[str, float]) -> None:
        """Latency before, as predicted and as measured, into the statistics."""
        assert self._search is not None
        found, statistics = self._found, self.statistics
        statistics["latency_before_ms"] = self.goal.before["latency"] * 1e3
        statistics["latency_candidates"] = self._search.candidates
        statistics["latency_measurements"] = self._search.table.measurements
        if found is None:
            reached["latency"] = self.goal.before["latency"]
            return
        statistics["latency_predicted_ms"] = found.predicted * 1e3
        if found.measured is None:
            self.diagnostics.append(
                Diagnostic("warning", "the latency is an estimate, nothing was measured")
            )
        else:
            statistics["latency_measured_ms"] = found.measured * 1e3
        reached["latency"] = found.seconds

    def _tell_sparsity(self) -> None:
        """The warning that a share of the prunable parameters was not reached."""
        whole = sum(self._prunable.values())
        if not whole or not self._kept:
            return
        erased = 1 - self._prunable_now() / whole
        slack = sum(f.parameters_per_unit for f in self._kept) * self.floors.round_to / whole
        if erased < self._sparsity - slack:
            self.diagnostics.append(
                Diagnostic(
                    "warning",
                    f"asked to erase {self._sparsity:.0%} of the prunable parameters, but only "
                    f"{erased:.0%} can go: each family keeps at least "
                    f"{self.floors.keep_at_least:g}",
                )
            )


def _given_scores(importance: object) -> Any:
    """Scores that the user gave, which belong to the units before the first step; else None."""
    return importance if isinstance(importance, torch.Tensor | Mapping) else None


def _left(given: Any, units: Units) -> Any:
    """Given scores of the units that are left after these went."""

    def left(score: object, gone: torch.Tensor) -> torch.Tensor:
        values = torch.as_tensor(score)
        stays = torch.ones(len(values), dtype=torch.bool)
        stays[gone] = False
        return values[stays.to(values.device)]

    if isinstance(given, torch.Tensor):
        return left(given, next(iter(units.values())))
    if isinstance(given, Mapping):
        by_name = {f.name: gone for f, gone in units.items()}
        return {n: left(s, by_name[n]) if n in by_name else s for n, s in given.items()}
    return given
