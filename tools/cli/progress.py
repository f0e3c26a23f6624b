"""Telling a person at a terminal what is going on; silent for everyone else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType

from torchlathe.ir import Program
from torchlathe.passes import Instrument, Pass, PassRecord

__all__ = ["Progress"]

# What passes report while they go over data.
_COUNTED = re.compile(r"\bbatch (\d+) of (\d+)\b")


class Progress:
    """A line with a spinner on standard error, while there is a terminal to show it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, text: Any) -> None:
        """Show this as what is being done now; a bar with it, if it counts batches."""
        if self._status is not None:
            self._status.update(_shown(str(text)))

    def instrument(self) -> Instrument:
        """Says which pass is running."""
        return _PassProgress(self)


def _shown(text: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    counted = _COUNTED.search(text)
    if counted is None:
        return Text(text)
    from rich.progress_bar import ProgressBar

    done, total = int(counted[1]) - 1, int(counted[2])
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(text), ProgressBar(total, done, width=24))
    return line


class _PassProgress(Instrument):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._count = 0

    def enter_pipeline(self, program: Program, passes: Sequence[Pass]) -> None:
        self._count = len(passes)

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self._progress.say(f"pass {position} of {self._count}: {item.spec()}")

    def after_pass(self, position: int, item: Pass, program: Program, record: PassRecord) -> None:
        self._progress.say(f"pass {position} of {self._count} is done")

    def exit_pipeline(self, program: Program, error: BaseException | None) -> None:
        self._progress.say("lowering and measuring")
