"""A sensitivity as rows, a table and a picture: which layers can be hurt least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from torchlathe.passes.analysis.curvature import Sensitivity

__all__ = [
    "SensitivityRow",
    "save_sensitivity_picture",
    "sensitivity_dicts",
    "sensitivity_rows",
    "sensitivity_table",
]

_BITS = 4
_MOST_BARS = 60


@dataclass(frozen=True)
class SensitivityRow:
    """One layer: a weight, with its bias.

    Attributes:
        name: Of the weight.
        parameters: Of the weight and its bias.
        trace: Of the curvature of the two, as far as samples tell.
        trace_error: Standard error of the trace.
        top: Largest eigenvalue of the weight's block: by Lanczos where it was asked for, else of
            the Kronecker factors.
        rounding: Predicted change of the loss for rounding the weight to 4 bits, a scale per row.
        rounding_second: The second-order part of it.
    """

    name: str
    parameters: int
    trace: float
    trace_error: float
    top: float
    rounding: float
    rounding_second: float


def sensitivity_rows(sensitivity: Sensitivity) -> tuple[SensitivityRow, ...]:
    """A row for each layer that has factors, in execution order; tied ones once."""
    from torchlathe.passes.analysis.curvature import quantise_delta

    values = sensitivity.objective.parameters()
    rows = {}
    for layer in sensitivity.layers.values():
        if layer.weight in rows:
            continue
        names = [layer.weight, *([layer.bias] if layer.bias in values else [])]
        trace = sensitivity.trace(*names)
        found = sensitivity.extremes.get(layer.weight)
        top = found[0] if found else sum(x.top for x in sensitivity.layers_of(layer.weight))
        # A table is not worth a run over the data per layer, and for rounding factors are enough.
        method = "kfac" if sensitivity.method == "auto" else sensitivity.method
        delta = {layer.weight: quantise_delta(values[layer.weight], _BITS)}
        cost = sensitivity.predict(delta, method)
        rows[layer.weight] = SensitivityRow(
            layer.weight,
            sum(values[name].numel() for name in names),
            trace.value,
            trace.standard_error,
            top,
            cost.total,
            cost.second,
        )
    return tuple(rows.values())


def sensitivity_dicts(rows: Sequence[SensitivityRow]) -> list[dict[str, Any]]:
    """As JSON takes them."""
    return [asdict(row) for row in rows]


def sensitivity_table(
    rows: Sequence[SensitivityRow], *, limit: int | None = None
) -> RenderableType:
    """The rows that cost most to round, in execution order."""
    from rich.table import Table

    from torchlathe.tools.figures import count_text, shorten

    title = f"sensitivity of {len(rows)} layers"
    if limit is not None and len(rows) > limit:
        title += f", the {limit} that cost most to round"
        dearest = sorted(rows, key=lambda row: -row.rounding_second)[:limit]
        rows = [row for row in rows if row in dearest]
    table = Table(title=title)
    table.add_column("layer")
    heads = ("parameters", "trace", "±", "top eigenvalue", f"{_BITS}-bit rounding", "2nd order")
    for name in heads:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            shorten(row.name, 48),
            count_text(row.parameters),
            f"{row.trace:.3g}",
            f"{row.trace_error:.1g}",
            f"{row.top:.3g}",
            f"{row.rounding:+.2e}",
            f"{row.rounding_second:.2e}",
        )
    return table


def save_sensitivity_picture(rows: Sequence[SensitivityRow], path: str | Path) -> None:
    """Bars, one per layer: trace with its error, and the cost of rounding.

    Args:
        rows: Of `sensitivity_rows`; the first 60 are drawn.
        path: Of a .svg, .png or .pdf file.
    """
    import matplotlib

    from torchlathe.tools.figures import shorten

    with matplotlib.rc_context({"svg.hashsalt": "torchlathe", "svg.fonttype": "none"}):
        from matplotlib.figure import Figure

        rows = rows[:_MOST_BARS]
        figure = Figure(figsize=(9.0, 1.0 + 0.22 * len(rows)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        places = range(len(rows))
        errors = [row.trace_error if row.trace_error == row.trace_error else 0.0 for row in rows]
        left.barh(places, [row.trace for row in rows], xerr=errors, color="#4c72b0", height=0.65)
        left.set_title("trace of the curvature", fontsize=9)
        right.barh(places, [row.rounding_second for row in rows], color="#c44e52", height=0.65)
        right.set_title(f"predicted cost of {_BITS}-bit rounding (2nd order)", fontsize=9)
        left.set_yticks(list(places), [shorten(row.name, 44) for row in rows], fontsize=7)
        left.set_ylim(len(rows) - 0.4, -0.6)
        for axis in (left, right):
            axis.set_xscale("symlog", linthresh=_threshold(axis))
            axis.tick_params(axis="x", labelsize=7)
            axis.grid(axis="x", alpha=0.3)
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _threshold(axis: Any) -> float:
    """Where the scale turns linear: a thousandth of the longest bar."""
    longest = max((abs(bar.get_width()) for bar in axis.patches), default=1.0)
    return longest / 1000 or 1.0
