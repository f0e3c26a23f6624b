"""Telling a person at a terminal what is going on; silent for everyone else."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from torchlathe.ir import Program
from torchlathe.passes import Instrument, Pass, PassRecord

__all__ = ["Progress"]


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
        """Show this as what is being done now."""
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(str(text)))

    def instrument(self) -> Instrument:
        """Says which pass is running."""
        return _PassProgress(self)


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
