"""Finding the rung of a ladder at which a program is fast enough, by measuring few candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from torchlathe.ir import Program
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups
from torchlathe.passes.rewrite.allocation.climbing import first_rung
from torchlathe.passes.rewrite.erasing.shrink import erase_units

__all__ = ["Found", "LatencySearch"]

Units = Mapping[Family, torch.Tensor]

_STEPS = 8  # halvings of the ladder: candidates are told apart to 1/256 of it
_ROUNDS = 3  # searches, each with a factor that the candidate found before it has corrected
_NEAR = (0.95, 1.02)  # measured over asked: near enough not to search again


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        rung: Of the ladder.
        predicted: Seconds, by the table.
        measured: Seconds of the whole program; None where it cannot be timed.
    """

    rung: int
    predicted: float
    measured: float | None

    @property
    def seconds(self) -> float:
        """As measured, or else as predicted."""
        return self.predicted if self.measured is None else self.measured


@dataclass
class LatencySearch:
    """Predicts how long erased programs take, and searches for one that is fast enough.

    A candidate is erased on a copy of the program; its ops are looked up in the table, or
    measured. A search tries at most 30 candidates, and times 3 of them as a whole.

    Attributes:
        table: Of the device.
        report: Called with what is being done.
        factor: Measured seconds of a whole program over the sum of its ops.
        seconds: What the program as it is now takes.
        candidates: Candidates tried so far.
    """

    table: LatencyTable
    report: Callable[[str], None]
    factor: float = 1.0
    seconds: float = 0.0
    candidates: int = 0
    _sums: dict[int, float] = field(default_factory=dict)

    def begin(self, program: Program) -> float:
        """Seconds of a program, from which the factor is set; the estimate if it cannot run."""
        self.report("latency: measuring the program and its ops")
        total = self.seconds = self.table.program(program).seconds
        if self._runs(program):
            (self.seconds,) = self.table.whole(program)
            self.factor = self.seconds / max(total, 1e-12)
        return self.seconds

    def find(
        self, program: Program, units_at: Callable[[int], Units], low: int, high: int, most: float
    ) -> Found:
        """The first rung from ``low`` on at which the program takes at most ``most`` seconds.

        If it does at none, the fastest of those tried.

        Args:
            program: Left as it is.
            units_at: Units to erase at a rung.
            low: Where other limits hold.
            high: The last rung.
            most: Seconds.
        """
        self._sums = {}
        tried: list[Found] = []
        for _ in range(_ROUNDS):
            found = self._search(program, units_at, low, high, most)
            tried.append(found)
            if found.measured is None or _NEAR[0] <= found.measured / most <= _NEAR[1]:
                break
            if found.predicted > most or (found.rung == low and found.measured < most):
                break
            self.factor *= found.measured / max(found.predicted, 1e-12)
        fast = [f for f in tried if f.seconds <= most * _NEAR[1]]
        best = min(fast, key=lambda f: f.rung) if fast else min(tried, key=lambda f: f.seconds)
        self.seconds = best.seconds
        return best

    def _search(
        self, program: Program, units_at: Callable[[int], Units], low: int, high: int, most: float
    ) -> Found:
        """One search with the factor as it is, and what its result really takes."""
        rung = self._bisect(program, units_at, low, high, most)
        if self._predict(program, units_at, rung) > most:
            # Norms that erasing writes out in the open may even make it slower than at first.
            self._predict(program, units_at, low)
            rung = min(self._sums, key=lambda tried: (self._sums[tried], tried))
        predicted = self._predict(program, units_at, rung)
        if not self._runs(program):
            return Found(rung, predicted, None)
        self.report("latency: measuring the candidate")
        # In turn with the program as it is: what slows the machine down is seen in both.
        now, measured = self.table.whole(program, self._candidate(program, units_at(rung)))
        return Found(rung, predicted, measured * self.seconds / max(now, 1e-12))

    def _bisect(
        self,
        program: Program,
        units_at: Callable[[int], Units],
        low: int,
        high: int,
        most: float,
    ) -> int:
        stride = max(1, -(-(high - low) >> _STEPS))

        def holds(step: int) -> bool:
            rung = min(high, low + step * stride)
            self.report(f"latency: candidate {self.candidates + 1}")
            return self._predict(program, units_at, rung) <= most

        last = -(-(high - low) // stride)
        return min(high, low + first_rung(holds, 0, last) * stride)

    def _predict(self, program: Program, units_at: Callable[[int], Units], rung: int) -> float:
        if rung not in self._sums:
            self.candidates += 1
            candidate = self._candidate(program, units_at(rung))
            self._sums[rung] = self.table.program(candidate).seconds
        return self.factor * self._sums[rung]

    def _candidate(self, program: Program, units: Units) -> Program:
        """What erasing these units gives."""
        copy = program.copy()
        # The copy has nodes of its own, but the same families in the same order.
        theirs = copy.analysis(ZeroInvariantGroups).all
        place = {f: i for i, f in enumerate(program.analysis(ZeroInvariantGroups).all)}
        own = {theirs[place[f]]: gone for f, gone in units.items() if len(gone)}
        if own:
            erase_units(copy, own)
        return copy

    def _runs(self, program: Program) -> bool:
        return self.table.measure and cannot_run(program) is None
