"""Writes the measured part of ``docs/sparse_training.md`` from its result file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Final

from torchlathe.tools.bench.bench_sparse_training import (
    ABLATED,
    ABLATION,
    RESULTS,
    SPARSITIES,
)
from torchlathe.tools.bench.drawing import svg
from torchlathe.tools.bench.intervals import half_width, interval
from torchlathe.tools.bench.markdown import markdown_table, rewrite_measured
from torchlathe.tools.bench.sparse_training.contestants import METHODS
from torchlathe.tools.bench.sparse_training.peer import PEER
from torchlathe.tools.bench.sparse_training.planted import CONTESTANTS
from torchlathe.tools.bench.sparse_training.resnet import STAGES

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "sparse_training.md"
_LOWEST: Final = 90.0  # accuracy that the picture shows
HEAD = """\
## Measured

<!-- From here on written by torchlathe.tools.bench.sparse_training_page; do not edit. -->

`python -m torchlathe.tools.bench.bench_sparse_training` on {cpu}, {threads} thread, torch {torch}.

### Quality against group sparsity

Everything trains from scratch for the same number of steps, on the same data; the same share of
groups is zero at the end, and no family keeps less than the default of `keep_at_least`. *Magnitude,
one shot* trains half of the steps, makes the groups of the lowest norm zero at once, and fine-tunes
for the other half; Torch-Pruning does so with its own groups, of which it takes the same share, in
small steps without training in between (in one step its bound on a layer does not hold). How the
ViT is trained was chosen on a part of the training images, for the dense net and for HESSO; nothing
was chosen for the other methods. (Each seed splits the images anew, so that images it was chosen on
are test images of other seeds. Two seeds of an earlier form, with patches side by side, had been
measured on the test images before: HESSO was 1.3 and 1.7 points below dense, and the search went
on.) Mean over seeds with the 95 % interval of the mean (Student's t), and in brackets the share of
the parameters that is left: methods take different groups, so the share differs at one sparsity.
The largest difference of an output between trained
and erased models, over the largest output, was {error:.1e}.

![quality against the share of groups that is zero](sparse_training.svg)
"""

TITLES = {
    "digits CNN": "**Digits, CNN**: accuracy in %, higher is better; {steps} steps.",
    "digits ViT": "**Digits, ViT** of three layers, 64 wide with 256 hidden units, on patches that "
    "overlap:\naccuracy in %, higher is better; {steps} steps, images moved by a pixel at most.",
    "characters": "**Characters, small Llama**: perplexity, lower is better; {steps} steps.",
}

OPTIONS = """
### Which options matter

HESSO on the digits CNN at 70 %, accuracy in %; {count} seed{s}. The last column is the difference
to the first line, seed by seed.
"""

PLANTED = """
### A unit of low magnitude that everything depends on

Twelve hidden units; the one through which the signal goes has the smallest weights of all, and
seven are to go. Median error over the signal's power at the end; {count} seeds.
"""

RESNET = """
### ResNet-18, 10 classes

For 32 x 32 images, as in the tutorial of Only-Train-Once, which publishes 2,880 groups of which 865
stay at 0.7, −91 % of the parameters and −80 % of the FLOPs after 100 epochs on CIFAR-10. Here it
was trained for {steps} steps on drawn images, so which groups go says little; their numbers, and
what is left of the model, are exact.

The number of groups says nothing of where they are, and that decides FLOPs: a channel of the first
stage, on maps of 32 x 32, is computed at 64 times the positions of one of the last. Where *every*
family keeps the same share, as many groups come to −91 % of both. So the published net must keep
more than that share early, and ours, by the saliency of {steps} steps on noise, keeps all of it:
its FLOPs are not comparable with those of a trained net. The last columns are the share of the
groups that is kept, by the channels of the stage.
"""

OVERHEAD = """
### Overhead of HESSO

Over a step of AdamW on an encoder of 12 layers ({parameters:.1f} M parameters, {groups:,} groups),
one of the base and one of HESSO in turn; medians of the ratio. *Decay* and *zero* are steps while
groups leave and after; *choosing* is the first step of a period. The last two columns are sums over
all steps of two periods of 50: over the steps of the optimizer, and over training steps (batch 8 of
32 tokens). *Before*, HESSO does nothing: what is not 1.00 there is how exact the others are.
Zeroing moves each prunable weight through memory once, so its share is the larger the less the base
does; *foreach* and *fused* are torch's options of AdamW.
"""

BASES = {"default": "AdamW", "foreach": "AdamW, foreach", "fused": "AdamW, fused"}


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    rows = result["rows"]
    errors = [r["error"] for r in rows.values() if isinstance(r, dict) and "error" in r]
    parts = [HEAD.format(**result, error=max(errors, default=0.0))]
    for task, title in TITLES.items():
        if dense := _rows(rows, task, "dense", 0):
            steps = dense[0]["steps"]
            parts += [f"\n{title.format(steps=steps)}\n", _quality(rows, task)]
            parts.append(_against_dense(rows, task))
    parts.append(_ablation(rows))
    if seeds := [r for k, r in rows.items() if k.startswith("small|planted")]:
        parts += [PLANTED.format(count=len(seeds)), _planted(seeds)]
    if nets := [r for k, r in rows.items() if k.startswith("small|resnet18")]:
        parts += [RESNET.format(**nets[0]), _resnet(nets)]
    if spent := rows.get("small|overhead"):
        filled = {**spent, "parameters": spent["parameters"] / 1e6}
        parts += [OVERHEAD.format(**filled), _overhead(spent)]
    return "".join(parts)


def _quality(rows: dict[str, Any], task: str) -> str:
    """A line for each method; cells say of how many seeds they are where others are of more."""
    sparsities = (0, *sorted(SPARSITIES[task]))
    found = {(m, p): _rows(rows, task, m, p) for m in (*METHODS, PEER) for p in sparsities}
    methods = [m for m in (*METHODS, PEER) if any(found[m, p] for p in sparsities)]
    most = {p: max(len(found[m, p]) for m in methods) for p in sparsities}
    shown = [p for p in sparsities if most[p]]
    lines = [[m, *(_cell(found[m, p], most[p]) for p in shown)] for m in methods]
    heads = [f"{p:.0%} zero, {most[p]} seed{'s' * (most[p] > 1)}" for p in shown]
    return _table(["method", *heads], lines)


def _plot(rows: dict[str, Any], path: Path) -> None:
    """Each method's mean over the share of zero groups, with intervals; dense as a band."""
    tasks = [task for task in TITLES if _rows(rows, task, "dense", 0)]
    with svg(path, 4 * len(tasks), 3.8, len(tasks)) as panels:
        for axes, task in zip(panels, tasks, strict=True):
            dense = [row["metric"] for row in _rows(rows, task, "dense", 0)]
            axes.axhspan(
                mean(dense) - half_width(dense), mean(dense) + half_width(dense), alpha=0.15
            )
            axes.axhline(mean(dense), linewidth=0.8, label="dense")
            names = [name for name in (*METHODS, PEER) if name != "dense"]
            for place, name in enumerate(names):
                found = {p: _rows(rows, task, name, p) for p in sorted(SPARSITIES[task])}
                values = {p: [r["metric"] for r in f] for p, f in found.items() if len(f) > 1}
                # Side by side, so that intervals do not hide each other.
                places = [100 * p + 0.8 * (place - len(names) / 2) for p in values]
                axes.errorbar(
                    places,
                    [mean(v) for v in values.values()],
                    yerr=[half_width(v) for v in values.values()],
                    fmt="o-",
                    markersize=3,
                    linewidth=0.8,
                    capsize=2,
                    label=name,
                )
            axes.set_title(task)
            axes.set_xlabel("% of the groups zero")
            axes.set_ylabel("accuracy, %" if task.startswith("digits") else "perplexity")
            if task.startswith("digits"):
                axes.set_ylim(bottom=max(axes.get_ylim()[0], _LOWEST))
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=6)


def _rows(rows: dict[str, Any], task: str, method: str, sparsity: float) -> list[dict[str, Any]]:
    keys = (f"{task}|{method}|{sparsity}|{seed}" for seed in range(99))
    return [rows[key] for key in keys if key in rows]


def _cell(found: Sequence[dict[str, Any]], most: int) -> str:
    if not found:
        return ""
    text = _interval([row["metric"] for row in found])
    text += f" ({mean(row['kept'] for row in found):.0%})" if found[0]["kept"] < 1 else ""
    return text if len(found) == most else f"{text}, {len(found)} of the seeds"


def _interval(values: Sequence[float]) -> str:
    return interval(values, 1 if mean(values) > 20 else 2)


def _against_dense(rows: dict[str, Any], task: str) -> str:
    """What HESSO changes, seed by seed, where there are several."""
    told = []
    for sparsity in sorted(SPARSITIES[task]):
        keys = [(f"{task}|HESSO|{sparsity}|{s}", f"{task}|dense|0|{s}") for s in range(99)]
        gains = [
            rows[sparse]["metric"] - rows[dense]["metric"]
            for sparse, dense in keys
            if sparse in rows and dense in rows
        ]
        if len(gains) < 2:
            continue
        digits = 1 if task.startswith("digits") else 2
        found = f"{mean(gains):+.{digits}f} ± {half_width(gains):.{digits}f}"
        told.append(f"{found.replace('-', '−')} at {100 * sparsity:.0f} %")
    if not told:
        return ""
    return f"\nHESSO less dense, over the same seeds: {', '.join(told)}.\n"


def _ablation(rows: dict[str, Any]) -> str:
    """Options of HESSO, each on its own; with the seeds that all were measured with."""
    keys = {"as it is": "|".join(map(str, ABLATED))}
    keys |= {n: f"ablation|{n}" for n in ABLATION if f"ablation|{n}|0" in rows}
    seeds = [s for s in range(99) if all(f"{key}|{s}" in rows for key in keys.values())]
    if len(keys) < 2 or not seeds:
        return ""
    lines = []
    for name, key in keys.items():
        found = [rows[f"{key}|{seed}"]["metric"] for seed in seeds]
        usual = [rows[f"{keys['as it is']}|{seed}"]["metric"] for seed in seeds]
        gains = [a - b for a, b in zip(found, usual, strict=True)]
        told = interval(gains).replace("-", "−") if name != "as it is" else ""
        lines.append([name, interval(found), told])
    text = OPTIONS.format(count=len(seeds), s="s" * (len(seeds) > 1))
    return text + _table(["options", "accuracy", "difference"], lines)


def _planted(seeds: Sequence[dict[str, Any]]) -> str:
    lines = []
    for name in CONTESTANTS:
        found = [row[name] for row in seeds]
        after = sorted(row["after"] for row in found)
        kept = sum(row["kept"] for row in found)
        lines.append([name, f"{kept} of {len(found)}", f"{after[len(after) // 2]:.3f}"])
    return _table(["method", "unit kept", "error at the end"], lines)


def _resnet(nets: Sequence[dict[str, Any]]) -> str:
    blank = [""] * len(STAGES)
    lines = [
        ["published (CIFAR-10)", "865 of 2,880", "0.98 M of 11.17 M (−91 %)", "−80 %", "", *blank]
    ]
    for row in nets:
        name = "every family keeps 30 %"
        if "keep_at_least" in row:
            floor = row["keep_at_least"]
            name = "as it is" if floor is None else f"`keep_at_least={floor}`"
        kept = row.get("kept_shares", {})
        lines.append(
            [
                name,
                f"{row['kept']} of {row['groups']:,}",
                f"{row['parameters_after'] / 1e6:.2f} M of {row['parameters'] / 1e6:.2f} M "
                f"(−{1 - row['parameters_after'] / row['parameters']:.0%})".replace("%", " %"),
                f"−{1 - row['flops_after'] / row['flops']:.0%}".replace("%", " %"),
                f"{row['error']:.1e}",
                *(f"{kept[str(s)]:.0%}" if str(s) in kept else "" for s in STAGES),
            ]
        )
    heads = ["", "groups kept", "parameters", "FLOPs", "error of the erase"]
    return _table([*heads, *map(str, STAGES)], lines)


def _overhead(spent: dict[str, Any]) -> str:
    lines = []
    for name, label in BASES.items():
        if (row := spent.get(name)) is None:
            continue
        period = row["periods"] - 1
        share = period * row["base_ms"] / row["training_step_ms"]
        cells = [row["before"], row["decay"], row["choosing"], row["zero"]]
        ratios = [f"{cell:.2f}" for cell in cells]
        added = [f"+{100 * period:.0f} %", f"+{100 * share:.1f} %"]
        lines.append([label, f"{row['base_ms']:.0f} ms", *ratios, *added])
    heads = ["base", "its step", "before", "decay", "choosing", "zero", "optimizer", "training"]
    above = [label for name, label in BASES.items() if spent.get(name, {}).get("periods", 0) > 1.15]
    told = f"\nOver {' and '.join(above)} it is more than 15 % of the step.\n" if above else ""
    memory = (
        f"\nMemory: {spent['lasting_bytes'] / 2**20:.1f} MiB throughout; while groups go, "
        f"{spent['copy_bytes'] / 2**20:.0f} MiB more, one copy of the "
        f"{spent['prunable_bytes'] / 2**20:.0f} MiB of prunable parameters.\n"
    )
    return _table(heads, lines) + told + memory


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n" + markdown_table(heads, lines)


def main() -> int:
    """Write the page and its picture; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    _plot(result["rows"], PAGE.with_name("sparse_training.svg"))
    return rewrite_measured(PAGE, measured(result))


if __name__ == "__main__":
    sys.exit(main())
