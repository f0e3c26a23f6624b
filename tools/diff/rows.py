"""What `diff` found, as rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["NodeDifference", "ProgramDiff"]


@dataclass(frozen=True)
class NodeDifference:
    """How far two values are apart that stand for the same thing in two programs.

    Attributes:
        index: Place in the execution order of the first program.
        name: Node in the first program.
        other: Node in the second.
        op: Of the second, such as ``aten.linear.default``.
        module: Path of the module that it belongs to.
        source: ``file:line (function)`` of the model's code, where it is known.
        made_by: The pass that made the node of the second program; "" if it was captured.
        shape: Of the value in the second program.
        error: Norm of the difference over the norm of the first value.
        before: The largest error of the values that go into it.
        cosine: Of the two values; None if one is zero.
        largest: Largest difference of any one element.
        matched: How many indices of the first value the second has, over all of them: below 1
            where indices were erased, and the others compared.
        problem: Why nothing could be compared, such as another shape; "" otherwise.
    """

    index: int
    name: str
    other: str
    op: str
    module: str
    source: str
    made_by: str
    shape: tuple[int, ...]
    error: float | None = None
    before: float = 0.0
    cosine: float | None = None
    largest: float | None = None
    matched: float = 1.0
    problem: str = ""

    @property
    def growth(self) -> float:
        """How many times the error of its inputs its own is; infinite where those are equal."""
        if not self.error:
            return 0.0
        return self.error / self.before if self.before else math.inf

    @property
    def added(self) -> float:
        """How much of the error is its own: beyond the largest of its inputs."""
        return max(0.0, (self.error or 0.0) - self.before)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class ProgramDiff:
    """Two programs side by side.

    Attributes:
        first: Name of the one that is right.
        second: Name of the other.
        threshold: Relative error above which a value counts as different.
        rows: Every pair of values, in the execution order of the first program.
        outputs: The rows of the outputs, under their names.
        only_first: Ops that the second program has nothing for.
        only_second: Ops that the first has nothing for.
        inputs: Example inputs, as text.
    """

    first: str
    second: str
    threshold: float
    rows: tuple[NodeDifference, ...]
    outputs: tuple[tuple[str, NodeDifference], ...]
    only_first: tuple[str, ...] = ()
    only_second: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def compared(self) -> list[NodeDifference]:
        """The rows that have an error."""
        return [row for row in self.rows if row.error is not None]

    @property
    def starts(self) -> list[NodeDifference]:
        """Values that differ although what goes into them does not: where the error comes from."""
        limit = self.threshold
        return [r for r in self.compared if (r.error or 0.0) > limit and r.before <= limit]

    def grows(self, count: int = 10) -> list[NodeDifference]:
        """Values that add the most to the error of their inputs, the largest first."""
        found = [row for row in self.compared if (row.error or 0.0) > self.threshold]
        return sorted(found, key=lambda row: -row.added)[:count]

    @property
    def equal(self) -> bool:
        """Whether no output differs by more than the threshold, and all could be compared."""
        return all(row.error is not None and row.error <= self.threshold for _, row in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "first": self.first,
            "second": self.second,
            "threshold": self.threshold,
            "inputs": list(self.inputs),
            "rows": [row.to_dict() for row in self.rows],
            "outputs": {name: row.to_dict() for name, row in self.outputs},
            "starts": [row.name for row in self.starts],
            "only_first": list(self.only_first),
            "only_second": list(self.only_second),
        }

    def to_json(self) -> str:
        """The dict as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def print(self, console: Console | None = None, *, rows: int | None = 12) -> None:
        """Print the tables, by default to standard output.

        Args:
            console: Where to.
            rows: Of each table; None shows every value in order of execution too.
        """
        from rich.console import Console

        from torchlathe.tools.diff.tables import renderables

        console = console or Console()
        for part in renderables(self, rows):
            console.print(part)

    def text(self, *, width: int = 110, rows: int | None = 12) -> str:
        """The tables as plain text."""
        from rich.console import Console

        console = Console(width=width, color_system=None, force_terminal=False)
        with console.capture() as captured:
            self.print(console, rows=rows)
        return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"

    def picture(self, path: str | Path) -> None:
        """Draw the error along the program.

        Args:
            path: A ``.svg``, ``.png`` or ``.pdf`` file.
        """
        from torchlathe.tools.diff.picture import draw

        draw(self, path)

    def __str__(self) -> str:
        return self.text().rstrip("\n")


def largest(rows: Sequence[NodeDifference]) -> float:
    """The largest error of some rows; 0 if none has one."""
    return max((row.error or 0.0 for row in rows), default=0.0)
