"""The auto backend: measures the others on this machine, and keeps the fastest that agrees."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from torchlathe.backends.base import (
    Backend,
    Capabilities,
    Configured,
    FlatCallable,
    Lowerable,
    backend_text,
    get_backend,
)
from torchlathe.backends.examples import flat_examples
from torchlathe.backends.needs import missing_packages
from torchlathe.ir import BackendError, Error, OptionError, UnsupportedError

__all__ = ["Auto", "AutoRun", "Candidate"]

# Those that lower in seconds come first, so that a short budget still compares some.
_CANDIDATES = ("eager", "openvino", "onnx", "inductor{freezing=true}")
_SAMPLE_SECONDS = 2e-3  # below this, one sample times several calls


@dataclass(frozen=True)
class Candidate:
    """What was found of one backend.

    Attributes:
        backend: Its text form.
        outcome: "kept", "slower", "skipped" or "refused".
        note: Why it was skipped or refused.
        milliseconds: Median of a call on the example inputs; None if it was not measured.
        low: The 20th percentile.
        high: The 80th percentile.
        lower_seconds: What lowering and checking took.
        error: How far it is from the eager program; see `Agreement`.
    """

    backend: str
    outcome: str
    note: str = ""
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    lower_seconds: float = 0.0
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class Auto(Configured):
    """Lowers by several backends, measures them in turn, and keeps the fastest that agrees.

    The calls are interleaved (A, B, C, A, B, C, ...), so that a machine that slows down meanwhile
    does so for all. ``compiled.candidates`` and the report have the table.

    Args:
        candidates: Backends as text, with options; those whose packages are missing are left out.
            Empty: eager, OpenVINO, ONNX Runtime, and the inductor with freezing.
        budget_seconds: For lowering and measuring. A lowering that has begun is not stopped; none
            begins after two thirds of it.
        rounds: At most so many samples of each.
    """

    name: ClassVar[str] = "auto"

    candidates: tuple[str, ...] = ()
    budget_seconds: float = 60.0
    rounds: int = 30

    def __post_init__(self) -> None:
        """Hold the options to their types and ranges, and read the candidates.

        Raises:
            OptionError: A value that cannot be.
            BackendError: A candidate that is not known.
        """
        super().__post_init__()
        if self.budget_seconds <= 0:
            raise OptionError(f"budget-seconds must be above 0, got {self.budget_seconds:g}")
        if self.rounds < 1:
            raise OptionError(f"rounds must be at least 1, got {self.rounds}")
        if any(isinstance(backend, Auto) for backend in self._backends()):
            raise OptionError("candidates cannot hold auto itself")

    @property
    def capabilities(self) -> Capabilities:
        """What the kept one can do is known afterwards; each candidate is checked by itself."""
        return Capabilities(training=True, checked=False)

    def lower(self, source: Lowerable) -> AutoRun:
        """Lower by each candidate, measure, and return the fastest.

        Raises:
            BackendError: No candidate can run the program.
        """
        started = time.perf_counter()
        rows: list[_Row] = []
        for backend in self._backends():
            row = _Row(backend)
            rows.append(row)
            left = self.budget_seconds * 2 / 3 - (time.perf_counter() - started)
            if missing := missing_packages(backend):
                row.outcome, row.note = "skipped", f"{', '.join(missing)} is not installed"
            elif left <= 0 and any(r.run for r in rows):
                row.outcome, row.note = "skipped", "the budget was spent"
            else:
                row.lower(source)
        usable = [row for row in rows if row.run is not None]
        if not usable:
            raise BackendError(
                "no candidate can run the program: "
                + "; ".join(f"{row.text}: {row.note}" for row in rows),
                hint='backend="eager" runs every program',
            )
        flat = flat_examples(source.program)
        _measure(usable, flat, started + self.budget_seconds, self.rounds)
        best = min(usable, key=lambda row: statistics.median(row.samples))
        best.outcome = "kept"
        assert best.run is not None
        return AutoRun(best.backend, best.run, tuple(row.candidate() for row in rows))

    def _backends(self) -> list[Backend]:
        return [get_backend(text) for text in self.candidates or _CANDIDATES]


@dataclass
class _Row:
    """A candidate while it is looked at."""

    backend: Backend
    outcome: str = "slower"
    note: str = ""
    run: FlatCallable | None = None
    seconds: float = 0.0
    error: float | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return backend_text(self.backend)

    def lower(self, source: Lowerable) -> None:
        from torchlathe.backends.lowering import lowered

        started = time.perf_counter()
        try:
            self.run, agreement = lowered(self.backend, source)
            self.error = None if agreement is None else agreement.error
        except Error as error:
            self.outcome, self.note = "refused", error.message
        self.seconds = time.perf_counter() - started

    def candidate(self) -> Candidate:
        if not self.samples:
            return Candidate(
                self.text, self.outcome, self.note, lower_seconds=self.seconds, error=self.error
            )
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        return Candidate(
            self.text,
            self.outcome,
            self.note,
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            self.seconds,
            self.error,
        )


def _measure(rows: Sequence[_Row], inputs: Sequence[Any], end: float, rounds: int) -> None:
    """Take samples of all in turn, in milliseconds per call; three rounds in any case."""
    cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)

    def sample(run: FlatCallable, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run(*inputs)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    with torch.inference_mode():
        runs = [row.run for row in rows if row.run is not None]
        for run in runs:
            sample(run, 1)
        fastest = min(sample(run, 1) for run in runs)
        calls = max(1, min(100, round(_SAMPLE_SECONDS / max(fastest, 1e-9))))
        for number in range(rounds):
            if number >= 3 and time.perf_counter() > end:
                return
            for row, run in zip(rows, runs, strict=True):
                row.samples.append(sample(run, calls) * 1e3)


class AutoRun:
    """The lowered program of the fastest candidate.

    Attributes:
        backend: The candidate that was kept.
        candidates: What was found of each.
        live: This run looks after changed tensors by itself.
    """

    live = True

    def __init__(
        self, backend: Backend, run: FlatCallable, candidates: tuple[Candidate, ...]
    ) -> None:
        self.backend = backend
        self.candidates = candidates
        self._run = run

    def __call__(self, *inputs: Any) -> Any:
        """Run it."""
        return self._run(*inputs)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what the kept backend made.

        Raises:
            UnsupportedError: It makes no file.
        """
        write = getattr(self._run, "write", None)
        if write is None:
            raise UnsupportedError(f"the backend that was kept, {self.backend.name!r}, has no file")
        write(path)
