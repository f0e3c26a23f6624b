"""What watches a pipeline: printing, dumping, timing, counting, and stopping early."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TextIO

from torchlathe.ir import Program, SpecError
from torchlathe.ir.files import write_text
from torchlathe.passes.base import Pass, PassRecord
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.registry import pass_names

__all__ = ["DumpIR", "Instrument", "PrintIR", "Statistics", "StopAfter", "Timing"]


class Instrument:
    """Hooks that the manager calls; each does nothing unless overridden.

    Positions count from 1. What a hook raises ends the run: it is not swallowed. An instrument
    reads the program and must not change it.
    """

    def enter_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Before the first pass."""

    def should_run(self, position: int, item: Pass, program: Program) -> bool:
        """Whether the pass is to run; False from any instrument skips it."""
        return True

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        """Before a pass that is going to run."""

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        """After a pass that ran and was verified."""

    def exit_pipeline(self, program: Program, error: BaseException | None) -> None:
        """After the last pass; with the error, if one ended the run."""


class PrintIR(Instrument):
    """Print the program after passes.

    Args:
        after: ``"all"``, or names of passes (a list, or text with commas).
        only_changed: Leave out passes that changed nothing.
        file: Where to; by default standard error, so that it does not mix with results.
    """

    def __init__(
        self,
        after: str | Collection[str] = "all",
        *,
        only_changed: bool = True,
        file: TextIO | None = None,
    ) -> None:
        names = after.split(",") if isinstance(after, str) else after
        self.names = frozenset(name.strip().replace("_", "-") for name in names if name.strip())
        self.only_changed = only_changed
        self.file = file

    def enter_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Refuse names that no pass has: they would print nothing.

        Raises:
            SpecError: There is no such pass.
        """
        known = {"all", *(item.name for item in passes)}
        for name in sorted(self.names - known):
            if name not in pass_names():
                raise SpecError(
                    f"cannot print after {name}: there is no such pass",
                    hint=did_you_mean(name, {*known, *pass_names()}),
                )

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        """Print the program."""
        if not {"all", item.name} & self.names or (self.only_changed and not record.changed):
            return
        file = self.file or sys.stderr
        file.write(f"# after pass {position}: {record.spec}\n{program.to_text().rstrip()}\n")
        file.flush()


class DumpIR(Instrument):
    """Write the program after each pass to ``<folder>/003_<pass>.txt``.

    ``000_input.txt`` is the program that the pipeline was given.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def enter_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        """Make the folder and write the first file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("000_input", program)

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        """Write the program."""
        self._write(f"{position:03d}_{item.name}", program)

    def _write(self, name: str, program: Program) -> None:
        path = self.folder / f"{name}.txt"
        write_text(path, program.to_text().rstrip() + "\n")


class Timing(Instrument):
    """Keep the time of each pass and of the checks after it; ``str()`` gives a table.

    Attributes:
        seconds: ``(pass, seconds of the pass, seconds of the checks)`` of each.
    """

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float, float]] = []

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        """Note the times."""
        comparing = float((record.verification or {}).get("seconds", 0.0))
        self.seconds.append((record.spec, record.seconds, comparing))

    def __str__(self) -> str:
        total = (sum(row[1] for row in self.seconds), sum(row[2] for row in self.seconds))
        lines = [f"{'pass [s]':>10} {'check [s]':>10}  pass"]
        for spec, own, comparing in (*self.seconds, ("total", *total)):
            lines.append(f"{own:10.4f} {comparing:10.4f}  {spec}")
        return "\n".join(lines)


class Statistics(Instrument):
    """Add up the statistics of passes by pass name; ``str()`` gives a table.

    Attributes:
        totals: Sum of each number by pass name and statistic; the last value where it is text.
    """

    def __init__(self) -> None:
        self.totals: dict[str, dict[str, int | float | str]] = {}

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        """Add the record's numbers."""
        own = self.totals.setdefault(item.name, {})
        for key, value in record.statistics.items():
            before = own.get(key, 0)
            if isinstance(value, str) or isinstance(before, str):
                own[key] = value
            else:
                own[key] = before + value

    def __str__(self) -> str:
        return "\n".join(
            f"{value:>12} {name} {key}"
            for name, own in self.totals.items()
            for key, value in own.items()
        )


class StopAfter(Instrument):
    """Run the first ``count`` passes and skip the rest, to find the one that does the damage."""

    def __init__(self, count: int) -> None:
        self.count = count

    def should_run(self, position: int, item: Pass, program: Program) -> bool:
        """Whether the pass is one of the first."""
        return position <= self.count
