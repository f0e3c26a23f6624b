"""Writes ``docs/scaling.md`` and its picture from ``results/scaling_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchlathe.ir.files import atomic, write_text
from torchlathe.tools.bench.bench_scaling import RESULTS, STAGES

__all__ = ["draw", "main", "scaling_page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"

_OURS = tuple(stage for stage in STAGES if stage != "export")
_COLOURS = ("#1f6feb", "#1a7f4b", "#c2740a", "#8250df", "#cf222e", "#626b78")

INTRODUCTION = """\
# Scaling

<!-- Written by `python -m torchlathe.tools.bench.scaling_page` from tools/bench/results; do not
edit. -->

How the cost of analysis and erase grows with the number of nodes of the graph. Deep networks of 300
to 20,000 nodes are captured, analysed and erased at half size; a slope of 1 is linear.

`python -m torchlathe.tools.bench.bench_scaling --rounds {rounds}` on {cpu}, one thread, torch
{torch}. CPU seconds, the least of {rounds}: other programs ran on the machine, and CPU time does
not count them. Slopes are of least squares in logarithms, over all sizes of a network.

![CPU seconds over nodes, both logarithmic](scaling.svg)

- *export* is `torch.export` itself, *lift* what torchlathe makes of its result;
- *terms* is the unification of all axes, *families* what is found from it: who writes, who reads,
  and whether erasing is exact;
- *cost* is parameters, bytes and FLOPs per node, *verify* the check of level `fast`;
- *erase* scores, chooses and erases, with everything that follows.
"""

CONCAT = """\
In this network every layer reads all layers before it, so that its edges grow with the square of
its nodes, and so does everything that looks at each of them once. Over its *edges*, the slopes are
{slopes}.
"""


def scaling_page(results: Path = RESULTS) -> str:
    """The page as text.

    Raises:
        FileNotFoundError: The result file is missing.
    """
    data = json.loads(results.read_text(encoding="utf-8"))
    machine = data["machine"]
    introduction = INTRODUCTION.format(
        rounds=data["rounds"], cpu=machine["cpu"], torch=machine["torch"]
    )
    return introduction + "".join(text for net in data["nets"] for text in _net(net))


def _net(net: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {net['net'].capitalize()}\n\n{net['about'][0].upper() + net['about'][1:]}.\n\n"
    heads = ("nodes", "edges", "families", *STAGES)
    yield f"| {' | '.join(heads)} |\n| {' | '.join('---:' for _ in heads)} |\n"
    for row in net["rows"]:
        counts = [f"{row[key]:,}" for key in ("nodes", "edges", "families")]
        times = [_seconds(row["seconds"][stage]) for stage in STAGES]
        yield f"| {' | '.join([*counts, *times])} |\n"
    slopes = [f"**{net['slopes'][stage]:.2f}**" for stage in STAGES]
    yield f"| slope | | | {' | '.join(slopes)} |\n"
    if net["net"] == "one dense block":
        by_edges = ", ".join(f"{s} {net['slopes_by_edges'][s]:.2f}" for s in _OURS)
        yield "\n" + CONCAT.format(slopes=by_edges)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def draw(path: Path, results: Path = RESULTS) -> None:
    """Draw one panel per network: CPU seconds of each stage over nodes, with a linear slope."""
    import matplotlib
    from matplotlib.figure import Figure

    nets = json.loads(results.read_text(encoding="utf-8"))["nets"]
    settings: Any = {"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "0"}
    with matplotlib.rc_context(settings), atomic(path) as draft:
        figure = Figure(figsize=(10.0, 3.4), layout="constrained")
        panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
        for panel, net in zip(panels, nets, strict=True):
            _panel(panel, net)
        panels[0].set_ylabel("CPU seconds")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
        figure.savefig(draft, format="svg", metadata={"Date": None})


def _panel(panel: Any, net: dict[str, Any]) -> None:
    nodes = [row["nodes"] for row in net["rows"]]
    for stage, colour in zip(_OURS, _COLOURS, strict=True):
        seconds = [row["seconds"][stage] for row in net["rows"]]
        panel.plot(nodes, seconds, "o-", color=colour, label=stage, markersize=3, linewidth=1.2)
    first = net["rows"][0]["seconds"]["erase"]
    linear = [2 * first * n / nodes[0] for n in nodes]
    panel.plot(nodes, linear, ":", color="#9aa3af", label="linear")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_title(net["net"])
    panel.set_xlabel("nodes")
    panel.grid(visible=True, color="#e4e7eb", linewidth=0.6)


def main() -> int:
    """Write the page and the picture; returns the exit status."""
    write_text(PAGE, scaling_page())
    draw(PAGE.with_suffix(".svg"))
    sys.stdout.write(f"wrote {PAGE} and {PAGE.with_suffix('.svg').name}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
