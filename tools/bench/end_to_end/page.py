"""The end-to-end part of ``docs/backends.md``: a table for each case, and one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import atomic
from torchlathe.tools.bench.end_to_end.contestants import BASE
from torchlathe.tools.bench.markdown import markdown_table
from torchlathe.tools.latency import quantile

__all__ = ["draw", "end_to_end_part", "speed_of"]

TEXT: Final = """
### End to end

`python -m torchlathe.tools.bench.bench_end_to_end` on {cpu}, torch {torch}, {threads}: milliseconds
of a call ({clock}), median of rounds in which each contestant took turns with the original under
the inductor, and the median of the rounds' ratios as *speed*. Cosine is the least of any row of
the output, on inputs that no pass has seen.

![speed and cosine](end_to_end.svg)
"""

RANDOM: Final = """
Weights are random: the time depends on sizes alone, but the cosine is not what a trained model
would lose. Rounding costs less here, since no channel stands out; erased units cost more, since
none repeats what others do. It tells that a runtime computes what it should.
"""

_CLOCKS: Final = {"wall": "by the clock on the wall", "cpu": "CPU time of the process"}


def end_to_end_part(result: Mapping[str, Any]) -> str:
    """The part as Markdown; nothing if no contestant was measured."""
    cases = {name: case for name, case in result["cases"].items() if case["rows"]}
    rows = [row for case in cases.values() for row in case["rows"].values() if "ms" in row]
    if not rows:
        return ""
    threads = sorted({f"{row['threads']} thread{'s' * (row['threads'] != 1)}" for row in rows})
    clocks = sorted({_CLOCKS[row["clock"]] for row in rows})
    how = {**result["machine"], "threads": " or ".join(threads), "clock": " or ".join(clocks)}
    parts = [TEXT.format(**how)]
    for name, case in cases.items():
        parts.append(f"\n#### {name}, {case['weights']} weights\n")
        if case["weights"] == "random":
            parts.append(RANDOM)
        cells = [[_name(key), *_cells(row)] for key, row in _ordered(case["rows"])]
        parts.append("\n" + markdown_table(["", "ms", "speed", "cosine"], cells))
    return "".join(parts)


def speed_of(row: Mapping[str, Any]) -> float | None:
    """How many times as fast as the original under the inductor; None if it was not measured."""
    if "ms" not in row:
        return None
    return quantile([a / b for a, b in zip(row["base_ms"], row["ms"], strict=True)], 0.5)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw speed against what is lost of the cosine, a panel for each case."""
    import matplotlib
    from matplotlib.figure import Figure

    cases = {
        name: found
        for name, case in result["cases"].items()
        if (found := [(k, r) for k, r in case["rows"].items() if "ms" in r])
    }
    if not cases:
        return
    figure = Figure(figsize=(9, 3.6 * ((len(cases) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(cases) + 1) // 2, min(2, len(cases)), squeeze=False).flat
    for axes, (name, rows) in zip(panels, cases.items(), strict=False):
        for kind, colour in (("torchlathe", "#1f6feb"), ("", "#8c959f")):
            own = [(k, r) for k, r in rows if k.startswith("torchlathe") == bool(kind)]
            speeds = [speed_of(row) or 0.0 for _, row in own]
            lost = [max(1.0 - row["cosine"], 1e-7) for _, row in own]
            axes.scatter(lost, speeds, color=colour, s=22)
            for (key, _), x, y in zip(own, lost, speeds, strict=True):
                where = {"xytext": (3, 3), "textcoords": "offset points"}
                axes.annotate(_short(key), (x, y), fontsize=6, **where)
        axes.axvline(1e-2, color="#d0d7de", linewidth=0.8)
        axes.axvline(2e-2, color="#d0d7de", linewidth=0.8)
        axes.set(xscale="log", xlim=(5e-8, 1), title=name)
        axes.set_xlabel("1 - cosine")
        axes.set_ylabel("speed")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:
        axes.set_visible(False)
    with atomic(path) as draft, matplotlib.rc_context({"svg.hashsalt": "torchlathe"}):
        figure.savefig(draft, format="svg", metadata={"Date": None})


def _ordered(rows: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Originals in their order, then ours with the fastest first."""
    others = [(key, row) for key, row in rows.items() if not key.startswith("torchlathe")]
    own = [(key, row) for key, row in rows.items() if key.startswith("torchlathe")]
    return others + sorted(own, key=lambda item: -(speed_of(item[1]) or 0.0))


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "cosine" not in row:
        return ["-", "-", " ".join(row.get("problem", "").split())[:120].replace("|", "/")]
    speed = speed_of(row)
    cosine = f"{row['cosine']:.4f}"
    if speed is None:
        return ["-", "-", cosine]
    return [f"{quantile(row['ms'], 0.5):.1f}", f"{speed:.2f}", cosine]


def _name(key: str) -> str:
    passes, dot, backend = key.removeprefix("torchlathe ").partition(" · ")
    if not key.startswith("torchlathe") or not dot:
        return key
    return f"torchlathe, `{passes}`, `{backend}`" if passes != "no passes" else f"`{backend}`"


def _short(key: str) -> str:
    """A name for a picture, without what most pipelines share."""
    if not key.startswith("torchlathe"):
        return key.removeprefix("original, ") if key != BASE else "inductor"
    passes, _, backend = key.removeprefix("torchlathe ").partition(" · ")
    parts = []
    if "sparsity=" in passes:
        parts.append(f"erase {passes.partition('sparsity=')[2].partition(',')[0]}")
    if "quantize" in passes:
        parts.append("w8a16" if "w8a16" in passes else "w8a8")
    return " ".join([*parts, backend.partition("{")[0]])
