"""A comparison of models as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torchlathe.ir import OptionError
from torchlathe.ir.files import atomic
from torchlathe.tools.figures import bytes_text, ms_text, shorten

if TYPE_CHECKING:
    from torchlathe.tools.model_bench.rows import ModelBench

__all__ = ["check_picture", "draw"]

_SUFFIXES = (".svg", ".png", ".pdf")


def check_picture(path: str | Path) -> Path:
    """The path of a picture.

    Raises:
        OptionError: A kind of file that is none.
    """
    target = Path(path)
    if target.suffix not in _SUFFIXES:
        raise OptionError(f"a picture is {', '.join(_SUFFIXES)}, not {target.name}")
    return target


def draw(found: ModelBench, path: str | Path) -> None:
    """Draw the latency of each model with its spread, its size, and its cosine.

    Raises:
        OptionError: Another kind of file.
    """
    target = check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if row.milliseconds]
    figure = Figure(figsize=(10, 1.1 + 0.45 * len(rows)), layout="constrained")
    times, sizes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.4))
    places = list(range(len(rows)))
    medians = [row.percentile(0.5) for row in rows]
    spread = [
        [m - row.percentile(0.2) for m, row in zip(medians, rows, strict=True)],
        [row.percentile(0.95) - m for m, row in zip(medians, rows, strict=True)],
    ]
    colours = ["#8c959f", *["#1f6feb"] * (len(rows) - 1)]
    times.barh(places, medians, color=colours, height=0.6, xerr=spread, ecolor="#57606a")
    for place, row, median in zip(places, rows, medians, strict=True):
        cosine = "" if row.cosine is None else f", cosine {row.cosine:.4f}"
        speed = found.speedup(row)
        ratio = "" if place == 0 or speed is None else f" ({speed:.2f}×)"
        end = max(row.percentile(0.95), median)
        times.annotate(
            f"{ms_text(median)}{ratio}{cosine}",
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    times.set_xlim(0, 1.6 * max((row.percentile(0.95) for row in rows), default=1.0))
    times.set_yticks(places, [shorten(row.name, 40) for row in rows])
    times.set_xlabel("milliseconds per call: median, p20 to p95")
    sizes.barh(places, [row.bytes / 2**20 for row in rows], color=colours, height=0.6)
    for place, row in zip(places, rows, strict=True):
        sizes.annotate(
            bytes_text(row.bytes),
            (row.bytes / 2**20, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    sizes.set_xlim(0, 1.5 * max((row.bytes for row in rows), default=1) / 2**20 or 1)
    sizes.set_xlabel("size, MiB")
    times.invert_yaxis()
    for axes in (times, sizes):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with atomic(target) as draft, matplotlib.rc_context({"svg.hashsalt": "torchlathe"}):
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        figure.savefig(draft, metadata=metadata.get(target.suffix), dpi=130)
