"""Writes the measured part of ``docs/distill.md``, and its plot, from the result file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from torchlathe.tools.bench.bench_distill import RESULTS
from torchlathe.tools.bench.distilling.data import TASKS
from torchlathe.tools.bench.distilling.runs import ABLATIONS, METHODS, RATIO, Method
from torchlathe.tools.bench.drawing import svg
from torchlathe.tools.bench.intervals import half_width, interval
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "distill.md"
LEVEL: Final = 0.05

HEAD = """\
## Measured

<!-- From here on written by `python -m torchlathe.tools.bench.distill_page`; do not edit. -->

`python -m torchlathe.tools.bench.bench_distill` on {cpu}, {threads} thread, torch {torch}. Data
sets of scikit-learn, split anew by each seed, 36 of 100 samples to test on. Teachers have three
hidden layers (of 96 units, or of 24 channels for the CNN); a student has the same form and at least
{ratio} times fewer parameters. All students train for the same number of steps from the same first
weights; HPM-KD has three teachers, and one student in between that trains for as many steps again.
LSSKD has no teacher; it learns rotations where inputs are images. Options are alpha = 0.7, T = 4
and delta = 2, chosen beforehand; rates and steps were chosen for students that learn alone, on the
test part of one further split, whose rows are among those of the splits here.

Means over seeds with their 95 % interval (Student's t). Accuracy in % (higher is better), expected
calibration error in 15 bins by torchmetrics in % (lower is better). *p* is of a paired t-test over
seeds against the student alone, multiplied for the {methods} methods of a data set (Holm).

![accuracy of students](distill.svg)
"""

RETENTION = """
### Retention of HPM-KD

The paper (arXiv 2512.09886) has 85 % of the teacher's accuracy at 10 to 15 times fewer parameters.
Here, the student's accuracy over that of its first teacher:
"""

ABLATED = """
### Ablations
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    rows = result["rows"]
    parts = [HEAD.format(**result, ratio=RATIO, methods=len(METHODS) - 1)]
    verdicts = []
    for task in TASKS:
        if seeds := _seeds(rows, task):
            text, found = _table(rows, task, seeds)
            parts.append(text)
            verdicts += found
    parts.append(_verdict(verdicts))
    parts += [RETENTION, _retention(rows)]
    ablated = [_ablation(rows, title, *found) for title, found in ABLATIONS.items()]
    parts += [ABLATED, *ablated] if any(ablated) else []
    return "\n".join(part.strip("\n") + "\n" for part in parts if part)


def _seeds(rows: dict[str, Any], task: str) -> list[int]:
    """The seeds that the teacher and every method were measured with."""
    names = ["teacher", *METHODS]
    return [s for s in range(99) if all(f"methods|{task}|{n}|{s}" in rows for n in names)]


def _values(rows: dict[str, Any], task: str, name: str, seeds: Sequence[int], what: str) -> Any:
    return [rows[f"methods|{task}|{name}|{seed}"][what] for seed in seeds]


def holm(values: Sequence[float]) -> list[float]:
    """Probabilities for that several tests were made, by Holm's method."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, most = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, values[index] * (len(values) - rank)))
        found[index] = most
    return found


def paired(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided probability of differences as large, if there were none; 1 where all are equal."""
    if len(a) < 2 or all(x == y for x, y in zip(a, b, strict=True)):
        return 1.0
    from scipy.stats import ttest_rel

    return float(ttest_rel(a, b).pvalue)


def _table(
    rows: dict[str, Any], task: str, seeds: Sequence[int]
) -> tuple[str, list[tuple[str, str, str, float, float]]]:
    names = [name for name in METHODS if name != "alone"]
    columns: dict[str, dict[str, float]] = {}
    gains: dict[str, dict[str, float]] = {}
    for what in ("accuracy", "ece"):
        alone = _values(rows, task, "alone", seeds, what)
        values = {name: _values(rows, task, name, seeds, what) for name in names}
        adjusted = holm([paired(values[name], alone) for name in names])
        columns[what] = dict(zip(names, adjusted, strict=True))
        gains[what] = {name: mean(values[name]) - mean(alone) for name in names}
    lines, verdicts = [], []
    for name in ("teacher", *METHODS):
        cells = [name, f"{_values(rows, task, name, seeds, 'parameters')[0]:,}"]
        for what in ("accuracy", "ece"):
            cells.append(interval(_values(rows, task, name, seeds, what)))
            cells.append(_probability(columns[what][name]) if name in names else "")
            if name in names:
                verdicts.append((task, name, what, columns[what][name], gains[what][name]))
        lines.append(cells)
    head = ["", "parameters", "accuracy", "p", "calibration error", "p"]
    return f"\n### {_title(task)}, {len(seeds)} seeds\n\n" + markdown_table(head, lines), verdicts


def _title(task: str) -> str:
    return task[0].upper() + task[1:]


def _probability(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else ("< 0.001" if value < 1e-3 else f"{value:.3f}")


def _verdict(verdicts: Sequence[tuple[str, str, str, float, float]]) -> str:
    """What differs significantly from the student alone, in words."""
    labels = {"accuracy": "accuracy", "ece": "calibration error"}
    found = [
        f"- {task}: {name} has a {'higher' if gain > 0 else 'lower'} {labels[what]} "
        f"({gain:+.1f} points)"
        for task, name, what, probability, gain in verdicts
        if probability < LEVEL
    ]
    text = (
        f"Of {len(verdicts)} comparisons with the student alone, {len(verdicts) - len(found)} show "
        f"no significant difference at {100 * LEVEL:.0f} %."
    )
    return text + (" The others:\n\n" + "\n".join(found) if found else "")


def _retention(rows: dict[str, Any]) -> str:
    lines = []
    for task in TASKS:
        if not (seeds := _seeds(rows, task)):
            continue
        theirs = _values(rows, task, "teacher", seeds, "accuracy")
        cells = [task]
        for name in ("HPM-KD", "alone"):
            own = _values(rows, task, name, seeds, "accuracy")
            cells.append(interval([100 * a / b for a, b in zip(own, theirs, strict=True)]) + " %")
        whole = _values(rows, task, "teacher", seeds, "parameters")[0]
        left = _values(rows, task, "HPM-KD", seeds, "parameters")[0]
        lines.append([cells[0], f"{whole / left:.1f}", *cells[1:]])
    return markdown_table(["", "times fewer parameters", "HPM-KD", "student alone"], lines)


def _ablation(rows: dict[str, Any], title: str, task: str, methods: dict[str, Method]) -> str:
    # What is one of the methods was measured as that.
    known = {id(method): name for name, method in METHODS.items()}
    keys = {
        label: f"methods|{task}|{known[id(method)]}"
        if id(method) in known
        else f"ablations|{title}|{label}"
        for label, method in methods.items()
    }
    seeds = [s for s in range(99) if all(f"{key}|{s}" in rows for key in keys.values())]
    if not seeds:
        return ""
    lines = []
    for label, key in keys.items():
        found = [rows[f"{key}|{seed}"] for seed in seeds]
        lines.append([label, *(interval([r[what] for r in found]) for what in ("accuracy", "ece"))])
    head = ["", "accuracy", "calibration error"]
    return f"\n**{_title(title)}**, {task}, {len(seeds)} seeds:\n\n" + markdown_table(head, lines)


def _plot(rows: dict[str, Any], path: Path) -> None:
    """Accuracy of each method over that of the student alone, with intervals."""
    tasks = [task for task in TASKS if len(_seeds(rows, task)) > 1]
    names = [name for name in METHODS if name != "alone"]
    with svg(path, 7, 3.4) as (axes,):
        for place, name in enumerate(names):
            means, halves = [], []
            for task in tasks:
                seeds = _seeds(rows, task)
                alone = _values(rows, task, "alone", seeds, "accuracy")
                own = _values(rows, task, name, seeds, "accuracy")
                gains = [a - b for a, b in zip(own, alone, strict=True)]
                means.append(mean(gains))
                halves.append(half_width(gains))
            shift = 0.8 * (place + 0.5) / len(names) - 0.4
            places = [index + shift for index in range(len(tasks))]
            axes.errorbar(places, means, yerr=halves, fmt="o", markersize=4, capsize=3, label=name)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylabel("accuracy − student alone, points")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, ncols=len(names))


def main() -> int:
    """Write the page and the plot; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    _plot(result["rows"], PAGE.with_name("distill.svg"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
