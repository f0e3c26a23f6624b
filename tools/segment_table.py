"""The segment graph as rows: which branches of a network can go, and why the others cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.ir import Program

__all__ = ["SegmentRow", "segment_dicts", "segment_rows", "segment_table"]


@dataclass(frozen=True)
class SegmentRow:
    """One segment.

    Attributes:
        name: Of the segment.
        kind: "chain", "joint" or "output".
        op: What a joint does.
        calls: Its number of calls.
        parameters: Those that only it reads.
        successors: Names of the segments that read it.
        branch: Name of what dies with it; None if it is no operand of joints.
        dying_parameters: Of all that dies with it.
        dying_flops: The same.
        removable: Whether it can go and leave no trace.
        exactness: "exact", "exact-after-fold", "exact-after-correction" or "unknown".
        reason: Why it is not removable.
    """

    name: str
    kind: str
    op: str | None
    calls: int
    parameters: int
    successors: tuple[str, ...]
    branch: str | None
    dying_parameters: int
    dying_flops: int
    removable: bool
    exactness: str | None
    reason: str


def segment_rows(program: Program) -> tuple[SegmentRow, ...]:
    """A row for each segment, in execution order."""
    from torchlathe.passes import Segments

    return tuple(
        SegmentRow(
            name=segment.name,
            kind=segment.kind,
            op=segment.op,
            calls=len(segment.nodes),
            parameters=segment.parameter_count,
            successors=segment.successors,
            branch=segment.branch.name if segment.branch else None,
            dying_parameters=segment.branch.parameter_count if segment.branch else 0,
            dying_flops=segment.branch.flops if segment.branch else 0,
            removable=segment.removable,
            exactness=segment.branch.exactness if segment.branch else None,
            reason=segment.reason,
        )
        for segment in program.analysis(Segments)
    )


def segment_dicts(rows: Sequence[SegmentRow]) -> list[dict[str, Any]]:
    """The rows as JSON takes them."""
    return [{**asdict(row), "successors": list(row.successors)} for row in rows]


def segment_table(rows: Sequence[SegmentRow], *, limit: int | None = None) -> RenderableType:
    """The branches as a table, those that can go first, largest first.

    Args:
        rows: From `segment_rows`.
        limit: Show only so many.
    """
    from rich.markup import escape
    from rich.text import Text

    from torchlathe.tools.figures import count_text, flops_text
    from torchlathe.tools.report_text import new_table, section

    branches = [row for row in rows if row.branch is not None]
    branches.sort(key=lambda row: (not row.removable, -row.dying_parameters))
    shown = branches[:limit]
    table = new_table("*branch", ">params", ">FLOPs", "erasing is")
    for row in shown:
        how = row.exactness or "" if row.removable else f"not possible: {row.reason}"
        table.add_row(
            escape(row.branch or ""),
            count_text(row.dying_parameters),
            flops_text(row.dying_flops),
            Text(how, style="" if row.removable else "dim"),
        )
    more = [f"{len(branches) - len(shown)} branches more"] if len(branches) > len(shown) else []
    joints = sum(row.kind == "joint" for row in rows)
    caption = f"{len(rows)} segments, {joints} of them joints"
    return section("Branches", table, "; ".join([*more, caption]))
