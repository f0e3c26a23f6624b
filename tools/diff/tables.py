"""A diff as rich tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from torchlathe.tools.figures import error_text, shorten
from torchlathe.tools.report_text import new_table, section, short_place

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.tools.diff.rows import NodeDifference, ProgramDiff

__all__ = ["renderables"]


def renderables(found: ProgramDiff, rows: int | None) -> Iterator[RenderableType]:
    """The parts of a diff, in order of reading.

    Args:
        found: The diff.
        rows: Of each table; None shows every value in order of execution too.
    """
    compared = found.compared
    yield Text.assemble((found.first, "bold"), " against ", (found.second, "bold"))
    text = f"{len(compared)} values compared of {len(found.rows)} aligned"
    if found.only_first or found.only_second:
        text += f"; {len(found.only_first)} and {len(found.only_second)} ops have no counterpart"
    yield Text(f"{text}; inputs {', '.join(found.inputs)}", style="dim")
    yield _outputs(found)
    starts = found.starts
    if not starts:
        yield section("The error starts", Text(_nothing(found)))
    else:
        yield section("The error starts", _table(starts[:rows]), _more(starts, rows))
        yield section("Where it grows most", _table(found.grows(rows or 12)))
    if rows is None:
        yield section("All values, in the order of execution", _table(found.rows))


def _nothing(found: ProgramDiff) -> str:
    return f"nowhere: no value differs by more than {error_text(found.threshold)}"


def _more(rows: Sequence[NodeDifference], shown: int | None) -> str | None:
    left = len(rows) - shown if shown is not None else 0
    return f"... and {left} more places" if left > 0 else None


def _outputs(found: ProgramDiff) -> RenderableType:
    table = new_table("*output", ">rel. error", ">cosine", ">largest difference")
    for name, row in found.outputs:
        table.add_row(escape(name), *_numbers(row))
    return section("Outputs", table)


def _numbers(row: NodeDifference) -> tuple[str, str, str]:
    if row.error is None:
        return row.problem, "", ""
    return (
        error_text(row.error),
        "" if row.cosine is None else f"{row.cosine:.6f}",
        "" if row.largest is None else error_text(row.largest),
    )


def _table(rows: Sequence[NodeDifference]) -> RenderableType:
    table = new_table(">#", "*node", "op", ">rel. error", ">of inputs", ">cosine", "note")
    for row in rows:
        error, cosine, _ = _numbers(row)
        notes = [f"by {row.made_by.partition('{')[0]}"] if row.made_by else []
        if row.matched < 1:
            notes.append(f"{row.matched:.0%} kept")
        place = row.module or short_place(row.source) or row.other
        table.add_row(
            str(row.index),
            escape(f"{place} %{row.name}"),
            escape(shorten(row.op.removesuffix(".default"), 24)),
            error,
            error_text(row.before) if row.before else "0",
            cosine,
            ", ".join(notes),
        )
    return table
