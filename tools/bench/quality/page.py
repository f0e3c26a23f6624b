"""Writes ``docs/quality.md`` and its plots from ``results/quality_cpu.json``."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

__all__ = ["main", "quality_page", "slug"]

RESULTS: Final = Path(__file__).resolve().parents[1] / "results" / "quality_cpu.json"
PAGE: Final = Path(__file__).resolve().parents[3] / "docs" / "quality.md"

# (who, importance, scope, refitted)
Key = tuple[str, str, str, bool]
Curves = dict[Key, dict[float, list[tuple[float, float]]]]

INTRODUCTION = """\
# Accuracy against size

<!-- Written by `python -m torchlathe.tools.bench.quality.page` from tools/bench/results. -->

`python -m torchlathe.tools.bench.bench_quality`, on {cpu}, {threads} thread, torch {torch}; the
rows of Torch-Pruning and of the encoder in runs of their own, the former with earlier code of ours
beside it. Nothing is trained after the erase: the numbers are what each method leaves. Each
importance is [described here](importance.md); *refitted* is `compensate=true`.
Under each table stands where Torch-Pruning is ahead.
"""

DIGITS = """\
## {net}

Trained on scikit-learn's digits in the benchmark: {whole:.1%} of {tests} test images right before.
Means over {seeds} trainings, with the standard deviation where it is above a point. Columns are the
share of the parameters that is left. torchlathe stays within that share; Torch-Pruning 1.6 prunes
in 40 steps, with new importance at each, and its step nearest to the share counts, be it larger or
smaller. Calibration: 512 training images with labels.

![accuracy against size](quality_{slug}.svg)
"""

ENCODER = """\
## MiniLM

A pretrained sentence encoder (22.6 M parameters, half of them embeddings, which stay): feed-forward
channels and heads go, ranked globally. Spearman correlation of the similarities of all pairs of 96
sentences of Python's documentation to those of the original. Refitted to 64 other sentences,
without labels.

![agreement against size](quality_minilm.svg)
"""


def quality_page(result: dict[str, Any]) -> str:
    """The page as text.

    Args:
        result: The content of the result file.
    """
    parts = [INTRODUCTION.format(**result)]
    nets = list(dict.fromkeys(row["net"] for row in result["rows"]))
    for net in nets:
        rows = [row for row in result["rows"] if row["net"] == net]
        if net == "MiniLM":
            parts += [ENCODER, _encoder_table(rows)]
            continue
        seeds = len({row["seed"] for row in rows})
        whole = statistics.mean({row["seed"]: row["whole"] for row in rows}.values())
        head = DIGITS.format(net=net, whole=whole, tests=640, seeds=seeds, slug=slug(net))
        curves = _curves(rows)
        parts += [head, _table(curves), _verdict(curves)]
    return "\n".join(parts)


def slug(net: str) -> str:
    """How a net is called in names of files."""
    return net.lower().replace(" ", "_")


def _curves(rows: Iterable[dict[str, Any]]) -> Curves:
    """Per contestant and size, what is left and the metric, for each seed."""
    found: Curves = {}
    for row in rows:
        key = (row["who"], row["importance"], row["scope"], row["refit"])
        for point in row["points"]:
            sizes = found.setdefault(key, {})
            sizes.setdefault(point["size"], []).append((point["left"], point["metric"]))
    return found


def _mean(points: Iterable[tuple[float, float]]) -> float:
    return statistics.mean(metric for _, metric in points)


def _cell(points: list[tuple[float, float]]) -> str:
    values = [100 * metric for _, metric in points]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f}" + (f" ± {spread:.0f}" if spread >= 1 else "")


def _name(key: Key) -> str:
    who, importance, scope, refit = key
    scope = scope.replace("global/cost", "global, cost-aware")
    peer = "Torch-Pruning: " if who != "torchlathe" else ""
    return f"{peer}{importance}, {scope}{', **refitted**' if refit else ''}"


def _table(curves: Curves) -> str:
    sizes = sorted({size for curve in curves.values() for size in curve}, reverse=True)
    lines = [
        "| importance, allocation | " + " | ".join(f"{size:.0%}" for size in sizes) + " |",
        "| --- |" + " --- |" * len(sizes),
    ]
    order = sorted(curves, key=lambda key: (key[0] == "torchlathe" and not key[3], key[0], key))
    for key in sorted(order, key=lambda key: (not key[3], key[0] != "torchlathe")):
        cells = (_cell(curves[key][size]) for size in sizes)
        lines.append(f"| {_name(key)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _verdict(curves: Curves) -> str:
    """The best of each side at each size, and where the peer is ahead with the same importance."""
    sizes = sorted({size for curve in curves.values() for size in curve}, reverse=True)
    lines = [
        "| best at | torchlathe, refitted | torchlathe, as erased | Torch-Pruning |",
        "| --- | --- | --- | --- |",
    ]
    for size in sizes:
        cells = []
        for who, refit in (("torchlathe", True), ("torchlathe", False), ("torch-pruning", False)):
            keys = [k for k in curves if k[0] == who and k[3] == refit and size in curves[k]]
            if not keys:
                cells.append("-")
                continue
            best = max(keys, key=lambda k: _mean(curves[k][size]))
            label = f"{best[1]}, {best[2]}".replace("global/cost", "cost-aware")
            cells.append(f"{100 * _mean(curves[best][size]):.1f} ({label})")
        lines.append(f"| {size:.0%} | " + " | ".join(cells) + " |")
    worse = _worse(curves, sizes)
    text = "\n".join(lines) + "\n\n"
    if worse:
        text += "Where the same importance and allocation leave less than Torch-Pruning's:\n\n"
        text += "\n".join(f"- {line}" for line in worse) + "\n"
    else:
        text += "Nowhere do the same importance and allocation leave less than Torch-Pruning's.\n"
    return text


def _worse(curves: Curves, sizes: list[float]) -> list[str]:
    found = []
    for who, importance, scope, refit in sorted(curves):
        peer = curves.get(("torch-pruning", importance, scope, False))
        if who != "torchlathe" or peer is None:
            continue
        mine = curves[who, importance, scope, refit]
        behind = [
            f"{100 * _mean(mine[size]):.1f} against {100 * _mean(peer[size]):.1f} at {size:.0%}"
            for size in sizes
            if _mean(mine[size]) < _mean(peer[size]) - 0.001
        ]
        if behind:
            how = "refitted" if refit else "as erased"
            found.append(f"{importance}, {scope}, {how}: {'; '.join(behind)}")
    return found


def _encoder_table(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({p["size"] for row in rows for p in row["points"]}, reverse=True)
    header = [f"{size:.0%}" for size in sizes]
    lines = ["| importance | " + " | ".join(header) + " |", "| --- |" + " --- |" * len(header)]
    for row in rows:
        points = {p["size"]: p for p in row["points"]}
        how = ", **refitted**" if row["refit"] else ""
        cells = (f"{points[size]['metric']:.3f}" for size in sizes)
        lines.append(f"| {row['importance']}{how} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plot(net: str, curves: Curves, path: Path) -> None:
    """The best five of each kind by the mean over sizes; the rest would hide them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "torchlathe"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    styles = (
        ("torchlathe", True, "-", "o"),
        ("torchlathe", False, "--", "s"),
        ("torch-pruning", False, ":", "^"),
    )
    for who, refit, line, marker in styles:
        keys = [key for key in curves if key[0] == who and key[3] == refit]
        keys.sort(key=lambda key: -statistics.mean(map(_mean, curves[key].values())))
        for key in keys[:3]:
            points = sorted(curves[key].items())
            left = [statistics.mean(x for x, _ in seeds) for _, seeds in points]
            metric = [_mean(seeds) for _, seeds in points]
            label = _name(key).replace("**", "")
            axes.plot(left, metric, line, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.set_xlabel("share of the parameters left")
    axes.set_ylabel("Spearman correlation" if net == "MiniLM" else "test accuracy")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Write the page and its plots; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(quality_page(result), encoding="utf-8")
    for net in dict.fromkeys(row["net"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["net"] == net]
        _plot(net, _curves(rows), PAGE.with_name(f"quality_{slug(net)}.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
