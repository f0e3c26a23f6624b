"""What `bench_models` found, as rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.tools.latency import quantile

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ModelBench", "ModelRow"]


@dataclass(frozen=True)
class ModelRow:
    """What was measured of one model.

    Attributes:
        name: As it was named.
        milliseconds: One sample per round, per call; sample *i* of all models was taken in one
            round. Empty if the model failed.
        bytes: Of the file, or of parameters and buffers.
        parameters: How many numbers, if that is known.
        peak_bytes: Largest resident memory of a process that loads the model and runs it, beyond
            that of one that has only imported what is needed; None if it was not measured.
        cosine: Least cosine similarity of an output to the first model's.
        relative_error: Largest norm of a difference over the norm of the first model's output.
        load_seconds: Loading and lowering.
        problem: Why it could not be measured; "" otherwise.
    """

    name: str
    milliseconds: tuple[float, ...] = ()
    bytes: int = 0
    parameters: int | None = None
    peak_bytes: int | None = None
    cosine: float | None = None
    relative_error: float | None = None
    load_seconds: float = 0.0
    problem: str = ""

    def percentile(self, share: float) -> float:
        """Of the samples, in milliseconds per call."""
        return quantile(self.milliseconds, share)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, with the percentiles."""
        shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8, "p95": 0.95, "p99": 0.99}
        found = {n: self.percentile(s) for n, s in shares.items()} if self.milliseconds else {}
        return {**asdict(self), "percentiles": found}


@dataclass(frozen=True)
class ModelBench:
    """A comparison of models; the first is what the others are compared with.

    Attributes:
        rows: In the order that the models were given.
        inputs: ``float32[2, 16]`` for each tensor input.
        batch: Samples in a call: the first extent of the first input.
        threads: Intra-op threads.
        machine: Processor and versions.
    """

    rows: tuple[ModelRow, ...]
    inputs: tuple[str, ...]
    batch: int
    threads: int
    machine: Mapping[str, Any] = field(default_factory=dict)

    def speedup(self, row: ModelRow) -> float | None:
        """Median of the ratios that the rounds gave, first over this: above 1 it is faster."""
        first = self.rows[0]
        if not row.milliseconds or not first.milliseconds:
            return None
        pairs = zip(first.milliseconds, row.milliseconds, strict=True)
        return quantile([a / b for a, b in pairs], 0.5)

    def throughput(self, row: ModelRow) -> float | None:
        """Samples per second at the median."""
        return 1e3 * self.batch / row.percentile(0.5) if row.milliseconds else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        rows = [
            {**r.to_dict(), "speedup": self.speedup(r), "throughput": self.throughput(r)}
            for r in self.rows
        ]
        return {
            "inputs": list(self.inputs),
            "batch": self.batch,
            "threads": self.threads,
            "machine": dict(self.machine),
            "rows": rows,
        }

    def to_json(self) -> str:
        """The dict as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Print the table, by default to standard output."""
        from rich.console import Console

        from torchlathe.tools.model_bench.tables import renderables

        console = console or Console()
        for part in renderables(self):
            console.print(part)

    def text(self, *, width: int = 120) -> str:
        """The table as plain text."""
        from rich.console import Console

        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as captured:
            self.print(console)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"

    def picture(self, path: str | Path) -> None:
        """Draw latency against fidelity, and the size of each model.

        Args:
            path: A ``.svg``, ``.png`` or ``.pdf`` file.
        """
        from torchlathe.tools.model_bench.picture import draw

        draw(self, path)

    def __str__(self) -> str:
        return self.text().rstrip("\n")
