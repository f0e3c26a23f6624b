"""A diff as a picture: the error along the program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.ir import OptionError
from torchlathe.ir.files import atomic
from torchlathe.tools.figures import shorten

if TYPE_CHECKING:
    from torchlathe.tools.diff.rows import NodeDifference, ProgramDiff

__all__ = ["draw"]

_SUFFIXES = (".svg", ".png", ".pdf")
_LEAST = 1e-9  # a difference of zero has no place on a logarithmic axis
_LABELS = 6


def draw(found: ProgramDiff, path: str | Path) -> None:
    """Draw the error of each value in the order of execution, on a logarithmic axis.

    Raises:
        OptionError: Another kind of file.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise OptionError(f"a picture is {', '.join(_SUFFIXES)}, not {target.name}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = found.compared
    errors = [max(row.error or 0.0, _LEAST) for row in rows]
    axes.plot([r.index for r in rows], errors, color="#1f6feb", linewidth=1.2, zorder=2)
    axes.scatter([r.index for r in rows], errors, s=8, color="#1f6feb", zorder=3)
    starts = found.starts
    axes.scatter(
        [r.index for r in starts],
        [max(r.error or 0.0, _LEAST) for r in starts],
        s=42,
        facecolors="none",
        edgecolors="#cf222e",
        linewidths=1.4,
        zorder=4,
        label="the error starts",
    )
    axes.axhline(found.threshold, color="#7d8590", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_xlabel(f"op of {shorten(found.first, 60)}, in order of execution")
    axes.set_title(f"{shorten(found.second, 90)}", loc="left", fontsize=10)
    _label(axes, found)
    if starts:
        axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic(target) as draft:
        # The same diff gives the same bytes: no date, and ids from a fixed seed.
        import matplotlib

        with matplotlib.rc_context({"svg.hashsalt": "torchlathe", "svg.fonttype": "none"}):
            metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
            figure.savefig(draft, metadata=metadata.get(target.suffix), dpi=130)


def _label(axes: Any, found: ProgramDiff) -> None:
    """Name the places that add most to the error."""
    chosen: list[NodeDifference] = []
    span = max((row.index for row in found.rows), default=1)
    for row in found.grows(4 * _LABELS):
        # Labels of neighbours would lie on one another.
        if all(abs(row.index - other.index) > span / 14 for other in chosen):
            chosen.append(row)
    for row in chosen[:_LABELS]:
        axes.annotate(
            shorten(row.module or row.name, 34),
            (row.index, max(row.error or 0.0, _LEAST)),
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=7.5,
            rotation=28,
            color="#57606a",
        )
