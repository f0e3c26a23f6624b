"""A report as rich tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from torchlathe.tools.figures import (
    bytes_text,
    change_text,
    count_text,
    error_text,
    flops_text,
    ms_text,
    seconds_text,
    share_text,
    shorten,
    speedup_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.tools.report import Report

__all__ = [
    "agreement_text",
    "candidate_table",
    "cost_tables",
    "family_table",
    "new_table",
    "pin_table",
    "renderables",
    "section",
]

_FOLDERS = re.compile(r"/(?:[^\s/:]+/)+(?=[^\s/:]+/[^\s/:]+:\d)")
_MOST_FAMILIES = 12
_MOST_PINS = 8
_MOST_OUTPUTS = 12


def renderables(report: Report) -> Iterator[RenderableType]:
    """The parts of the report, in order of reading."""
    yield Text.assemble(
        (report.model, "bold"), " · ", report.pipeline or "no passes", " · ", report.backend
    )
    yield _totals(report)
    if report.passes:
        yield _passes(report)
        yield from _diagnostics(report)
    if report.fidelity:
        yield _fidelity(report)
    if report.candidates:
        yield candidate_table(report.candidates)
    if report.agreement is not None:
        yield _apart(Text(agreement_text(report)))
    if report.families:
        yield family_table(report.families, limit=_MOST_FAMILIES, name_width=38)
    if report.pins:
        yield pin_table(report.pins, limit=_MOST_PINS)
    if report.dropped:
        names = ", ".join(report.dropped[:4])
        more = f" and {len(report.dropped) - 4} more" if len(report.dropped) > 4 else ""
        yield _apart(Text(f"Dropped, never read by forward: {names}{more}"))
    for note in report.notes:
        yield _apart(Text(f"Note: {note}"))
    yield _footer(report)


def agreement_text(report: Report) -> str:
    """One sentence on how far the lowered program is from the eager one."""
    found = report.agreement or {}
    sizes = found.get("sizes", 1)
    return (
        f"Checked: {report.backend} is within {error_text(found.get('error', 0.0))} of the eager "
        f"program, tolerance {error_text(found.get('tolerance', 0.0))} for {found.get('dtype')}, "
        f"at {sizes} size{'s' if sizes != 1 else ''} of the inputs"
    )


def candidate_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What was measured of the backends that ``auto`` looked at; each as a `Candidate`'s dict."""
    table = new_table("*backend", ">median", ">p20 - p80", ">lowering", ">rel. error", "outcome")
    for row in rows:
        measured = row["milliseconds"] is not None
        note = f": {row['note']}" if row["note"] else ""
        table.add_row(
            escape(row["backend"]),
            ms_text(row["milliseconds"]) if measured else "",
            f"{ms_text(row['low'])} - {ms_text(row['high'])}" if measured else "",
            seconds_text(row["lower_seconds"]),
            "" if row["error"] is None else error_text(row["error"]),
            escape(row["outcome"] + note),
        )
    return section("Backends, measured in turn on the example inputs", table)


def new_table(*columns: str) -> Table:
    """A table in the one style that the tools use.

    Args:
        *columns: Headings; ``">heading"`` aligns right, ``"*heading"`` takes the room that is left.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        right, wide = column.startswith(">"), column.startswith("*")
        table.add_column(
            column.lstrip(">*"),
            justify="right" if right else "left",
            no_wrap=right,
            overflow="fold",
            ratio=1 if wide else None,
        )
    return table


def section(title: str, body: RenderableType, caption: str | None = None) -> RenderableType:
    """Something under a title, with an empty line before it and perhaps a remark after it."""
    parts: list[RenderableType] = [Text(title, style="bold"), body]
    if caption:
        parts.append(Text(caption, style="dim"))
    return _apart(Group(*parts))


def family_table(
    rows: Sequence[Any],
    *,
    limit: int | None = None,
    name_width: int | None = None,
    with_kept: bool = True,
) -> RenderableType:
    """Families that can shrink, as a table.

    Args:
        rows: Each as `FamilyRow`, largest first.
        limit: Show only so many.
        name_width: Show only the end of longer names; None folds them into lines.
        with_kept: Tell how many units are left.
    """
    free = [row for row in rows if row.prunable]
    shown = free[:limit]
    columns = ["*family", ">units", ">kept", ">params", "erasing is"]
    if not with_kept:
        columns.remove(">kept")
    more = [f"{len(free) - len(shown)} smaller"] if len(free) > len(shown) else []
    more += [f"{len(rows) - len(free)} that cannot shrink"] if len(rows) > len(free) else []
    caption = f"... and {', '.join(more)}" if more else None
    table = new_table(*columns)
    for row in shown:
        how = row.exactness.replace("-", " ")
        if reason := reason_text(row):
            how += f" ({reason})"
        cells: list[RenderableType] = [
            escape(shorten(row.name, name_width) if name_width else row.name),
            count_text(row.extent),
            count_text(row.parameters),
            Text(how, style="" if row.exactness.startswith("exact") else "yellow"),
        ]
        if with_kept:
            less = row.kept != row.extent
            kept = count_text(row.kept) if less else "all"
            cells.insert(2, Text(kept, style="green" if less else "dim"))
        table.add_row(*cells)
    return section("Families", table, caption)


def pin_table(rows: Sequence[Any], *, limit: int | None = None) -> RenderableType:
    """Pins as a table: why what cannot go cannot go."""
    shown = rows[:limit]
    left = len(rows) - len(shown)
    table = new_table("reason", "*where", ">families", ">params")
    for row in shown:
        table.add_row(
            escape(row.reason),
            escape(_places_text(row.places)),
            count_text(len(row.families)),
            count_text(row.parameters),
        )
    return section("Pinned", table, f"... and {left} more reasons" if left > 0 else None)


def _places_text(places: Sequence[str]) -> str:
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return short_place(places[0]) + more if places else ""


def cost_tables(cost: Any, *, limit: int | None = None) -> Iterator[RenderableType]:
    """Cost by operator and by module, as tables."""
    if cost is None:
        yield _apart(Text("Cost: not known, for a size depends on the data"))
        return
    for title, heading, rows in (
        ("Cost by operator", "operator", cost.operators),
        ("Cost by module", "module", cost.modules),
    ):
        shown = rows[:limit]
        left = len(rows) - len(shown)
        total = sum(row.flops for row in rows)
        table = new_table(f"*{heading}", ">calls", ">FLOPs", ">share", ">traffic", ">params")
        for row in shown:
            table.add_row(
                escape(row.name),
                count_text(row.calls),
                flops_text(row.flops) if row.flops else "",
                share_text(row.flops / total) if row.flops else "",
                bytes_text(row.bytes),
                count_text(row.parameters) if row.parameters else "",
            )
        yield section(title, table, f"... and {left} cheaper" if left > 0 else None)


def short_place(text: str | None) -> str:
    """The same text with paths cut to file and folder: ``bert/modeling_bert.py:12 (forward)``."""
    return _FOLDERS.sub("", text or "")


def reason_text(row: Any) -> str:
    """The first reason of a family's verdict, without the place."""
    return row.reasons[0].partition(": %")[0] if row.reasons else ""


def _totals(report: Report) -> RenderableType:
    table = new_table("", ">before", ">after", ">change")
    before, after = report.before, report.after
    table.add_row(
        "parameters",
        count_text(before.parameters),
        count_text(after.parameters),
        _change(before.parameters, after.parameters),
    )
    table.add_row(
        "size",
        bytes_text(before.bytes),
        bytes_text(after.bytes),
        _change(before.bytes, after.bytes),
    )
    if before.flops is not None and after.flops is not None:
        table.add_row(
            "FLOPs",
            flops_text(before.flops),
            flops_text(after.flops),
            _change(before.flops, after.flops),
        )
    if (latency := report.latency) is not None:
        speedup = latency.speedup
        table.add_row(
            "latency",
            ms_text(latency.original_median),
            ms_text(latency.compiled_median),
            Text(speedup_text(speedup), style="green" if speedup >= 1 else "yellow"),
        )
    return _apart(table)


def _change(before: float, after: float) -> Text:
    return Text(change_text(before, after), style="green" if after < before else "dim")


def _passes(report: Report) -> RenderableType:
    table = new_table(">#", "*pass", ">params", ">FLOPs", ">time", "verified")
    for index, record in enumerate(report.passes, 1):
        spec = str(record.get("spec", ""))
        if not record.get("changed", True):
            spec += "  (changed nothing)"
        table.add_row(
            str(index),
            escape(spec),
            _record_change(record, "parameters"),
            _record_change(record, "flops"),
            seconds_text(float(record.get("seconds") or 0.0)),
            verification_text(record),
        )
    return section("Passes", table)


def _record_change(record: dict[str, Any], what: str) -> str:
    before, after = record.get(f"{what}_before"), record.get(f"{what}_after")
    return "" if before is None or after is None else change_text(before, after)


def verification_text(record: dict[str, Any]) -> str:
    """What a pass promised, and what comparing the outputs found, in a few words."""
    promise = str(record.get("exactness") or "")
    verification = record.get("verification") or {}
    error = verification.get("max_rel_error")
    if promise == "analysis":
        return promise
    if error is None:
        return f"{promise}, not compared" if promise else "not compared"
    return ", ".join(filter(None, [promise, f"error {error_text(float(error))}"]))


def _diagnostics(report: Report) -> Iterator[RenderableType]:
    for _, diagnostic in report.diagnostics:
        severity = str(diagnostic.get("severity", "note"))
        where = diagnostic.get("where") or diagnostic.get("name")
        text = f"{severity}: {diagnostic.get('message', '')}"
        if where:
            text += f" [{short_place(str(where))}]"
        style = "yellow" if severity == "warning" else "dim"
        yield Padding(Text(text, style=style), (0, 0, 0, 3))


def _fidelity(report: Report) -> RenderableType:
    table = new_table("*output", "shape", ">cosine", ">rel. error", ">top-1")
    for entry in report.fidelity[:_MOST_OUTPUTS]:
        shape = f"{entry.dtype}[{', '.join(map(str, entry.shape))}]"
        note = f"  ({entry.note})" if entry.note else ""
        table.add_row(
            escape(entry.name + note),
            escape(shape),
            "" if entry.cosine is None else f"{entry.cosine:.5f}",
            "" if entry.relative_error is None else error_text(entry.relative_error),
            share_text(entry.top1) if entry.top1 is not None else "",
        )
    left = len(report.fidelity) - _MOST_OUTPUTS
    return section(
        f"Outputs against the original, on {report.fidelity_inputs or 'the inputs'}",
        table,
        f"... and {left} more" if left > 0 else None,
    )


def _footer(report: Report) -> RenderableType:
    parts = []
    if report.latency is not None:
        latency = report.latency
        threads = f"{latency.threads} thread{'s' if latency.threads != 1 else ''}"
        parts.append(
            f"Latency: median of {_runs(len(latency.original_ms))} on {latency.device} "
            f"with {threads}, {', '.join(latency.inputs)}."
        )
    stages = ", ".join(f"{name} {seconds_text(s)}" for name, s in report.stages.items())
    parts.append(f"Took {seconds_text(report.seconds)}" + (f" ({stages})." if stages else "."))
    if report.versions:
        parts.append(" ".join(f"{name} {value}" for name, value in report.versions.items()))
    return _apart(Text("\n".join(parts), style="dim"))


def _runs(count: int) -> str:
    return f"{count} interleaved runs" if count != 1 else "one run"


def _apart(part: RenderableType) -> RenderableType:
    """With an empty line before it."""
    return Padding(part, (1, 0, 0, 0), expand=False)
