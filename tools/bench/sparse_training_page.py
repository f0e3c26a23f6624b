"""Writes the measured part of ``docs/sparse_training.md`` from its result file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Final

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.bench_sparse_training import ABLATION, RESULTS, SPARSITIES
from torchlathe.tools.bench.sparse_training.contestants import METHODS
from torchlathe.tools.bench.sparse_training.peer import PEER
from torchlathe.tools.bench.sparse_training.planted import CONTESTANTS
from torchlathe.tools.bench.sparse_training.resnet import STAGES

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "sparse_training.md"
MARK: Final = "<!-- measured -->\n"
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T: Final = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}

HEAD = """
## Measured

<!-- From here on written by torchlathe.tools.bench.sparse_training_page; do not edit. -->

`python -m torchlathe.tools.bench.bench_sparse_training` on {cpu}, {threads} thread, torch {torch}.

### Quality against group sparsity

Everything trains from scratch for the same number of steps; the same share of groups is zero at the
end, and no family keeps less than the default of `keep_at_least`. *Magnitude, one shot* trains half
of the steps, makes the groups of the lowest norm zero at once, and fine-tunes for the other half;
Torch-Pruning does so with its own groups and the same share of channels, which leaves fewer
parameters. Steps are so few that all of this is measured in about an hour of one core, which cuts
the ViT short above all: its dense net has not learnt all that it can either. Mean over seeds with
the 95 % interval of the mean (Student's t), and in brackets the share of the parameters that is
left: methods take different groups, so the share differs at one sparsity. The largest difference of
an output between trained and erased models, over the largest output, was {error:.1e}.
"""

TITLES = {
    "digits CNN": "**Digits, CNN**: accuracy in %, higher is better; {steps} steps.",
    "digits ViT": "**Digits, ViT**: accuracy in %, higher is better; {steps} steps.",
    "characters": "**Characters, small Llama**: perplexity, lower is better; {steps} steps.",
}

ABLATED = """
### Which options matter

HESSO on the digits CNN at 70 %, accuracy in %; {count} seed(s).
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
groups leave and after; *choosing* is the first step of a period. The last two columns are for
periods of 50 steps: over the step of the optimizer, and over a training step (batch 8 of 32
tokens). Zeroing moves each prunable weight through memory once, so its share is the larger the less
the base does; *foreach* and *fused* are torch's options of AdamW.
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
        if _values(rows, task, "dense"):
            steps = next(r["steps"] for k, r in rows.items() if k.startswith(f"{task}|dense|"))
            parts += [f"\n{title.format(steps=steps)}\n", _quality(rows, task)]
    if found := [(n, v) for n in ABLATION if (v := _values(rows, "ablation", n))]:
        parts.append(ABLATED.format(count=len(found[0][1])))
        parts.append(_table(["options", "accuracy"], [[n, _interval(v)] for n, v in found]))
    if seeds := [r for k, r in rows.items() if k.startswith("small|planted")]:
        parts += [PLANTED.format(count=len(seeds)), _planted(seeds)]
    if nets := [r for k, r in rows.items() if k.startswith("small|resnet18")]:
        parts += [RESNET.format(**nets[0]), _resnet(nets)]
    if spent := rows.get("small|overhead"):
        filled = {**spent, "parameters": spent["parameters"] / 1e6}
        parts += [OVERHEAD.format(**filled), _overhead(spent)]
    return "".join(parts)


def _values(rows: dict[str, Any], *key: Any) -> list[float]:
    start = "|".join(map(str, key))
    return [r["metric"] for name, r in rows.items() if f"{name}|".startswith(f"{start}|")]


def _quality(rows: dict[str, Any], task: str) -> str:
    methods = [m for m in (*METHODS, PEER) if _values(rows, task, m)]
    seeds = {p: _seeds(rows, task, p, methods) for p in SPARSITIES[task]}
    measured = [p for p, found in seeds.items() if found]
    dense = [_values(rows, task, "dense", 0, seed)[0] for seed in seeds[measured[0]]]
    lines = [["dense", _interval(dense), *[""] * (len(measured) - 1)]]
    for method in methods[1:]:
        line = [method]
        for sparsity in measured:
            found = [rows[f"{task}|{method}|{sparsity}|{seed}"] for seed in seeds[sparsity]]
            kept = mean(row["kept"] for row in found)
            line.append(f"{_interval([row['metric'] for row in found])} ({kept:.0%})")
        lines.append(line)
    heads = [f"{p:.0%} zero, {len(seeds[p])} seed{'s' * (len(seeds[p]) > 1)}" for p in measured]
    return _table(["method", *heads], lines)


def _seeds(rows: dict[str, Any], task: str, sparsity: float, methods: Sequence[str]) -> list[int]:
    """The seeds that every method was measured with."""
    names = [(m, 0 if m == "dense" else sparsity) for m in methods]
    return [s for s in range(99) if all(f"{task}|{m}|{p}|{s}" in rows for m, p in names)]


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    half = _T.get(len(values) - 1, 2.0) * stdev(values) / len(values) ** 0.5
    digits = 1 if mean(values) > 20 else 2
    return f"{mean(values):.{digits}f} ± {half:.{digits}f}"


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
        period = row["decay"] - 1 + (row["choosing"] - row["decay"]) / 50
        share = period * row["base_ms"] / row["training_step_ms"]
        cells = [row["before"], row["decay"], row["choosing"], row["zero"]]
        ratios = [f"{cell:.2f}" for cell in cells]
        added = [f"+{100 * period:.0f} %", f"+{100 * share:.1f} %"]
        lines.append([label, f"{row['base_ms']:.0f} ms", *ratios, *added])
    heads = ["base", "its step", "before", "decay", "choosing", "zero", "optimizer", "training"]
    memory = (
        f"\nMemory: {spent['lasting_bytes'] / 2**20:.1f} MiB throughout; while groups go, "
        f"{spent['copy_bytes'] / 2**20:.0f} MiB more, one copy of the "
        f"{spent['prunable_bytes'] / 2**20:.0f} MiB of prunable parameters.\n"
    )
    return _table(heads, lines) + memory


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *lines]
    return "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def main() -> int:
    """Write the page."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    written = text[: text.index(MARK) + len(MARK)]
    write_text(PAGE, written + measured(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
