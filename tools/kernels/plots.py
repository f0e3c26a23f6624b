"""Plots of a benchmark of the kernels: latency against tokens, and the roofline.

``python -m torchlathe.tools.kernels.plots results.json docs`` draws what
``torchlathe kernels bench -o results.json`` or ``tools/gpu_check`` measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchlathe.ir.errors import OptionError
from torchlathe.ir.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "main"]

Row = Mapping[str, Any]

# Contestants in the order of the legend, with the colour and the style of their lines.
_LINES = {
    "ours": ("#1f6feb", "-"),
    "library": ("#c2740a", "-"),
    "gemlite": ("#8250df", "-"),
    "fp16": ("#57606a", "-"),
    "bf16": ("#57606a", ":"),
}
_COLOURS = ("#1f6feb", "#1a7f4b", "#c2740a", "#8250df", "#cf222e", "#0e7490")
_COLUMNS = 3


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw both plots of the rows of a benchmark.

    Args:
        rows: As `torchlathe.tools.kernels.benching.Measurement.as_dict` gives them.
        folder: Where ``kernels_latency.svg`` and ``kernels_roofline.svg`` go.

    Returns:
        The files.

    Raises:
        OptionError: There are no rows.
    """
    if not rows:
        raise OptionError("there is nothing to draw: no rows", hint="measure with `kernels bench`")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "kernels_latency.svg", folder / "kernels_roofline.svg"]
    for figure, path in zip((_latency(rows), _roofline(rows)), files, strict=True):
        _save(figure, path)
    return files


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    settings: Any = {"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "kernels"}
    with atomic(path) as draft, matplotlib.rc_context(settings):
        figure.savefig(draft, format="svg", metadata={"Date": None})


def _latency(rows: Sequence[Row]) -> Figure:
    """A panel for each op and shape: microseconds against tokens, both logarithmic."""
    panels: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["op"], row["n"], row["k"]), []).append(row)
    height = -(-len(panels) // _COLUMNS)
    figure = _figure(3.2 * _COLUMNS, 2.4 * height)
    axes = list(figure.subplots(height, _COLUMNS, squeeze=False).flat)
    for axis, ((op, n, k), found) in zip(axes, panels.items(), strict=False):
        _latency_panel(axis, sorted(found, key=lambda row: int(row["m"])))
        axis.set_title(f"{op} {n}x{k}", fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    first = figure.axes[0]
    first.set_xlabel("tokens")
    first.set_ylabel("microseconds")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _latency_panel(axis: Axes, rows: Sequence[Row]) -> None:
    for name, (colour, style) in _LINES.items():
        points = [(row["m"], row["seconds"][name]) for row in rows if name in row["seconds"]]
        if not points:
            continue
        tokens = [m for m, _ in points]
        axis.plot(
            tokens,
            [1e6 * samples["median"] for _, samples in points],
            color=colour,
            linestyle=style,
            marker="o",
            markersize=2.5,
            linewidth=1.2,
            label=name,
        )
        low, high = ([1e6 * samples[end] for _, samples in points] for end in ("low", "high"))
        axis.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)
    floors = [1e6 * row["floor"] for row in rows]
    tokens = [row["m"] for row in rows]
    axis.plot(tokens, floors, color="black", linestyle="--", linewidth=0.8, label="floor")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(tokens, [str(m) for m in tokens])
    _plain_ticks(axis)
    axis.grid(True, which="major", linewidth=0.3)


def _plain_ticks(axis: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _roofline(rows: Sequence[Row]) -> Figure:
    """Products a second against products for each byte, under the ceilings of the machine."""
    figure = _figure(5.2, 3.6)
    axis = figure.subplots()
    kept = [row for row in rows if row.get("ceilings") and row.get("moved")]
    for colour, op in zip(_COLOURS, dict.fromkeys(row["op"] for row in kept), strict=False):
        points = [_point(row) for row in kept if row["op"] == op]
        xs, ys = zip(*points, strict=True)
        axis.scatter(xs, ys, s=9, color=colour, label=op)
    if kept:
        ceilings = kept[0]["ceilings"]
        bandwidth, rate = ceilings["bytes_per_second"], ceilings["flops_per_second"]
        least = min(_point(row)[0] for row in kept) / 2
        most = max(4 * rate / bandwidth, 2 * max(_point(row)[0] for row in kept))
        for factor, name in ((1, "16-bit products"), (2, "8-bit products (twice that)")):
            bend = factor * rate / bandwidth
            heights = [least * bandwidth / 1e12, factor * rate / 1e12, factor * rate / 1e12]
            style = "-" if factor == 1 else "--"
            axis.plot([least, bend, most], heights, color="black", lw=0.8, ls=style, label=name)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations for each byte")
    axis.set_ylabel("TFLOP/s")
    axis.grid(True, which="major", linewidth=0.3)
    if kept:
        axis.legend(frameon=False, fontsize=7)
    return figure


def _point(row: Row) -> tuple[float, float]:
    operations = 2.0 * row["m"] * row["n"] * row["k"]
    return operations / row["moved"], operations / row["seconds"]["ours"]["median"] / 1e12


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the plots of a result file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="of `kernels bench -o` or tools/gpu_check")
    parser.add_argument("folder", type=Path, help="where the plots go")
    parsed = parser.parse_args(argv)
    data = json.loads(parsed.results.read_text(encoding="utf-8"))
    for path in draw(data.get("rows") or data.get("measurements") or [], parsed.folder):
        sys.stdout.write(f"wrote {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
