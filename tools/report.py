"""What compiling did to a model: as an object, as text, as JSON and as a page.

A `Report` holds plain values only, so that it goes into a saved model and comes back equal. What
measures and collects is in `torchlathe.tools.collecting`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.ir.files import write_text
from torchlathe.tools.fidelity import OutputFidelity
from torchlathe.tools.latency import Latency

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FamilyRow", "ParameterRow", "PinRow", "Report", "Totals"]

FORMAT = 1


@dataclass(frozen=True)
class Totals:
    """The size of a model.

    Attributes:
        parameters: How many numbers, tied ones once.
        bytes: Of parameters and buffers.
        flops: For one call at the example inputs' sizes; None if unknown.
        nodes: Operations in the graph.
    """

    parameters: int
    bytes: int
    flops: float | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class FamilyRow:
    """One family of coupled parameter slices.

    Attributes:
        name: Of the family.
        extent: Units before.
        kept: Units after.
        parameters: That the family owned before.
        exactness: As the analysis says: "exact", "exact-after-correction", ..., "approximate".
        reasons: Which correction, or why it is approximate.
        prunable: Whether units may go at all.
    """

    name: str
    extent: int
    kept: int
    parameters: int
    exactness: str
    reasons: tuple[str, ...] = ()
    prunable: bool = True


@dataclass(frozen=True)
class PinRow:
    """One reason that keeps families whole.

    Attributes:
        reason: Why.
        places: Where in the model's code, as far as known: module path and source line.
        families: Names of what it keeps whole.
        parameters: That these families own together.
    """

    reason: str
    places: tuple[str, ...]
    families: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class ParameterRow:
    """One parameter whose shape changed, or that went altogether (an empty ``after``)."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...] | None


@dataclass(frozen=True)
class Report:
    """Everything that is worth telling about one call of ``torchlathe.compile``.

    Attributes:
        model: Class name of the model.
        pipeline: Text form of the passes.
        backend: What runs the result.
        before: Size of the original.
        after: Size of the result.
        passes: One record per pass, as JSON-able dicts with the fields of ``PassRecord``.
        latency: None if it was not measured.
        fidelity: One entry per output tensor; empty if it was not measured.
        fidelity_inputs: What the outputs were compared on, such as "the example inputs".
        families: Families by parameters, largest first.
        pins: Reasons that keep axes whole, by parameters.
        parameters: Parameters whose shape changed.
        dropped: Parameters that the forward code never reads.
        inputs: ``name: float32[2, 16]`` of the example inputs.
        seconds: Of the whole compile.
        stages: Seconds by stage ("capture", "passes", "lower", "measure", ...).
        versions: Of Python, torch and torchlathe.
        notes: Anything else that a reader should know.
        agreement: How far what the backend made is from the eager program, with the fields of
            ``torchlathe.backends.Agreement``; None if it was not compared.
        candidates: What ``backend="auto"`` found, with the fields of ``backends.auto.Candidate``.
    """

    model: str
    pipeline: str
    before: Totals
    after: Totals
    backend: str = "eager"
    passes: tuple[dict[str, Any], ...] = ()
    latency: Latency | None = None
    fidelity: tuple[OutputFidelity, ...] = ()
    fidelity_inputs: str = ""
    families: tuple[FamilyRow, ...] = ()
    pins: tuple[PinRow, ...] = ()
    parameters: tuple[ParameterRow, ...] = ()
    dropped: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    agreement: dict[str, Any] | None = None
    candidates: tuple[dict[str, Any], ...] = ()

    # -- derived ---------------------------------------------------------------------------

    @property
    def diagnostics(self) -> list[tuple[str, dict[str, Any]]]:
        """Every diagnostic of every pass, with the pass' text form."""
        return [
            (str(record.get("spec", "")), dict(diagnostic))
            for record in self.passes
            for diagnostic in record.get("diagnostics") or ()
        ]

    @property
    def worst_cosine(self) -> float | None:
        """The least cosine of any output; None if no output has one."""
        return min((f.cosine for f in self.fidelity if f.cosine is not None), default=None)

    # -- forms -----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it; `from_dict` gives an equal report."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("before", "after"):
            data[name] = asdict(data[name])
        for name in ("families", "pins", "parameters"):
            data[name] = [asdict(row) for row in data[name]]
        data["latency"] = self.latency.to_dict() if self.latency else None
        data["fidelity"] = [entry.to_dict() for entry in self.fidelity]
        plain: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **data}))
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; fields that this version does not know are left out.

        Raises:
            ArtifactError: A report of another format, or one with fields missing.
        """
        from torchlathe.ir import ArtifactError

        if data.get("format") != FORMAT:
            raise ArtifactError(
                f"a report of format {data.get('format')!r}, expected {FORMAT}",
                hint="read it with the version of torchlathe that wrote it",
            )
        try:
            values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
            for name in ("before", "after"):
                values[name] = _row(Totals, values[name])
            for name, kind in _ROWS.items():
                values[name] = tuple(_row(kind, row) for row in values.get(name, ()))
            latency = values.get("latency")
            values["latency"] = Latency.from_dict(latency) if latency else None
            values["fidelity"] = tuple(
                OutputFidelity.from_dict(entry) for entry in values.get("fidelity", ())
            )
            for name in ("passes", "dropped", "inputs", "notes", "candidates"):
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(f"a report that cannot be read: {error}") from error

    def to_json(self) -> str:
        """The dict as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON form to a file; `load` reads it."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote.

        Raises:
            ArtifactError: The file is not a report.
        """
        from torchlathe.ir import ArtifactError

        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"{path} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ArtifactError(f"{path} is not a report")
        return cls.from_dict(data)

    def text(self, *, width: int = 100) -> str:
        """Tables as plain text.

        Args:
            width: Columns that it may take.
        """
        from rich.console import Console

        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as captured:
            self.print(console)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Print the tables, by default to standard output."""
        from rich.console import Console

        from torchlathe.tools.report_text import renderables

        console = console or Console()
        for part in renderables(self):
            console.print(part)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page.

        Args:
            path: Also written to this file, if given.
        """
        from torchlathe.tools.report_html import page

        text = page(self)
        if path is not None:
            write_text(path, text)
        return text

    def __str__(self) -> str:
        return self.text().rstrip("\n")


_ROWS: dict[str, type] = {"families": FamilyRow, "pins": PinRow, "parameters": ParameterRow}


def _row(kind: type, data: Mapping[str, Any]) -> Any:
    """A row from JSON: lists become tuples again."""
    known = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
