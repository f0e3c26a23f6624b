"""Explanations as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

    from torchlathe.passes.analysis.explain import (
        AxisPart,
        Coupled,
        Explanation,
        FamilyPart,
        Op,
        PinPart,
    )

__all__ = ["lines", "rich_text"]

_FOLDERS = re.compile(r"/(?:[^\s/:]+/)+(?=[^\s/:]+/[^\s/:]+:\d)")
_MOST_STEPS = 8  # of a path: its two ends are what matters
_MOST_AXES = 24

_KINDS = {
    "parameter": "the tensor {}",
    "axis": "the axis {}",
    "channel": "the index {}",
    "family": "the family {}",
    "module": "the module {}",
    "node": "the node {}",
    "op": "the op {}",
}


def rich_text(explanation: Explanation, limit: int | None) -> Text:
    """For a terminal."""
    from rich.text import Text

    text = Text()
    for line, style in lines(explanation, limit):
        text.append(line + "\n", style=style)
    return text[:-1]


def lines(explanation: Explanation, limit: int | None) -> Iterator[tuple[str, str]]:
    """Lines with their styles.

    Args:
        explanation: What to write.
        limit: Families, and coupled slices of each, to write; None for all.
    """
    yield _KINDS[explanation.kind].format(explanation.name), "bold"
    axes = explanation.axes[: limit and _MOST_AXES]
    for axis in axes:
        yield from _axis(axis)
    if len(axes) < len(explanation.axes):
        yield f"  ... and {len(explanation.axes) - len(axes)} more axes", "dim"
    for note in explanation.notes[:limit]:
        yield f"  note: {_short(note)}", "dim"
    if len(explanation.notes) > len(explanation.notes[:limit]):
        yield f"  ... and {len(explanation.notes) - (limit or 0)} more notes", "dim"
    shown = explanation.families[:limit]
    for part in shown:
        yield "", ""
        yield from _family(part, limit)
    if len(shown) < len(explanation.families):
        yield "", ""
        yield f"... and {len(explanation.families) - len(shown)} more families", "dim"


def _axis(axis: AxisPart) -> Iterator[tuple[str, str]]:
    text = f"  {axis.tensor}:{axis.axis} has {_count(axis.extent, 'index', 'indices')}"
    if axis.structure not in (str(axis.extent), "1"):
        text += f" = {axis.structure}"
    if axis.families:
        word = "family" if len(axis.families) == 1 else "families"
        text += f", {word} {', '.join(axis.families)}"
    yield text, ""
    if axis.index is not None:
        places = ", ".join(f"unit {unit} of {name}" for name, unit in axis.units)
        yield f"  index {axis.index} is {places or 'in no family'}", ""


def _family(part: FamilyPart, limit: int | None) -> Iterator[tuple[str, str]]:
    state = part.exactness.replace("-", " ")
    yield f"{part.name} · {_count(part.units, 'unit', 'units')} · {state}", "bold"
    for pin in part.pins:
        yield from _pin(pin)
    for reason in part.reasons:
        yield f"  {_short(reason)}", "yellow" if part.exactness == "approximate" else ""
    if part.parameters_per_unit:
        yield f"  one unit takes {part.parameters_per_unit:,} parameters along", ""
    shown = part.coupled[:limit]
    for slice_ in shown:
        yield from _coupled(slice_)
    if len(shown) < len(part.coupled):
        left = part.coupled[len(shown) :]
        writers = sum(s.role == "writes" for s in left)
        yield f"  ... and {len(left)} more, of which {writers} write", "dim"
    for advice in part.advice:
        yield f"  next: {advice}", "dim"


def _pin(pin: PinPart) -> Iterator[tuple[str, str]]:
    yield f"  pinned: {pin.reason}", "yellow"
    if pin.op is not None:
        yield f"    by {_op(pin.op)}", ""
    elif pin.where:
        yield f"    in {_short(pin.where)}", ""
    if len(pin.carried) > 1:
        yield f"    reached by {_path(pin.carried)}", "dim"


def _coupled(part: Coupled) -> Iterator[tuple[str, str]]:
    kind = "" if part.kind == "parameter" else f" ({part.kind})"
    per = "" if part.indices_per_unit == 1 else f", {part.indices_per_unit} indices per unit"
    yield f"  {part.role:<6}  {part.tensor}:{part.axis}{kind}{per}", ""
    for op in part.joined:
        yield f"            joined by {_op(op)}", "dim"
    if len(part.carried) > 1:
        yield f"            through {_path(part.carried)}", "dim"


def _op(op: Op) -> str:
    text = f"%{op.node} = {op.op}"
    if op.module:
        text += f" in {op.module}"
    if op.where:
        text += f" at {_short(op.where)}"
    return text


def _path(ops: Sequence[Op]) -> str:
    names = [op.op if op.node.startswith(("p_", "b_", "t_")) else f"%{op.node}" for op in ops]
    if len(names) > _MOST_STEPS:
        half = _MOST_STEPS // 2
        names = [*names[:half], f"({len(names) - 2 * half} more)", *names[-half:]]
    return " -> ".join(names)


def _count(number: int | str, one: str, many: str) -> str:
    text = f"{number:,}" if isinstance(number, int) else number
    return f"{text} {one if number == 1 else many}"


def _short(text: str) -> str:
    """Paths to source files by their last folder."""
    return _FOLDERS.sub("", text)
