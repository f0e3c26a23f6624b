"""Writes the measured part of ``docs/sharing.md`` from ``results/sharing_cpu.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.bench_sharing import RESULTS

__all__ = ["main", "measured"]

PAGE: Final = Path(__file__).resolve().parents[3] / "docs" / "sharing.md"
MARK: Final = "<!-- measured: written by `python -m torchlathe.tools.bench.sharing.page` -->"

HEAD = """\

`python -m torchlathe.tools.bench.bench_sharing` on {cpu}, {threads} thread, torch {torch}. The
model is MiniLM, a pretrained sentence encoder of six layers. Calibration: {calibration} English
sentences of Python's documentation; test: {test} others. Sizes are shares of the parameters of the
encoder's 36 linear layers; embeddings, norms and biases are not counted and stay as they are.
Nothing is trained.

### Own and shared bases at equal size

Relative error of the layers' outputs on the calibration data, the root of the sum of
`|x (W - M B)^T|^2` over that of `|x W^T|^2`, at half and a quarter of the layers' size. *Own* is
the whitened SVD of each layer, *shared* one basis for all layers of the row.
"""

FIDELITY = """\

### Fidelity of the embeddings

Mean cosine of the test sentences' embeddings to those of the original, and the 5 % quantile. The
first four rows fit bases under `curvature=outputs` and give every class its rank by one price, with
weights left in full where that pays: they differ in the classes alone. The other two are the
usual recipes: `curvature=inputs`, and every layer at the same ratio. All are without alignment
(`align=false`), which would move the inputs of `output.dense` and `attention.output.dense` alone.
"""

COSTS = """\

### Seconds for the cost of one pair

Square layers in float64, CPU time, the least of three. The last row is on paper: the widest
measured, times the cube of the ratio of widths, for all {pairs} pairs of 32 layers.
"""


def measured(result: dict[str, Any]) -> str:
    """The measured part as text.

    Args:
        result: The content of the result file.
    """
    head = HEAD.format(**result["machine"], **_sizes(result))
    parts = [head, _bases(result["bases"]), FIDELITY, _fidelity(result["fidelity"])]
    parts += [_verdict(result["fidelity"]), _classes(result["fidelity"])]
    parts += [COSTS.format(pairs=32 * 31 // 2), _costs(result["costs"])]
    return "\n".join(parts)


def _sizes(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("calibration", "test")}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _bases(rows: Sequence[dict[str, Any]]) -> str:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    found = {(row["group"], row["size"]): row for row in rows}
    header = ["layers", *(f"{what} at {s:.0%}" for s in sizes for what in ("own", "shared"))]
    table = []
    for group in dict.fromkeys(row["group"] for row in rows):
        cells = [group]
        for size in sizes:
            row = found[group, size]
            own, shared = f"{row['own']:.3f}", f"{row['shared']:.3f}"
            better = row["shared"] < row["own"]
            cells += [own, f"**{shared}**"] if better else [f"**{own}**", shared]
        table.append(cells)
    return _table(header, table)


def _fidelity(rows: Sequence[dict[str, Any]]) -> str:
    shares = list(dict.fromkeys(row["share"] for row in rows))
    found = {(row["who"], row["share"]): row for row in rows}
    header = ["classes", *(f"{1 - share:.0%} fewer" for share in shares)]
    table = []
    for who in dict.fromkeys(row["who"] for row in rows):
        cells = [who]
        for share in shares:
            row = found.get((who, share))
            if row is None:
                cells.append("-")
                continue
            best = max(r["cosine"] for r in rows if r["share"] == share)
            text = f"{row['cosine']:.4f}"
            text = f"**{text}**" if row["cosine"] >= best - 5e-5 else text
            cells.append(f"{text} ({row['cosine_5_percent']:.3f})")
        table.append(cells)
    return _table(header, table)


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Where the colouring is not the best, and what each costs by prediction."""
    lines = []
    for share in dict.fromkeys(row["share"] for row in rows):
        here = [row for row in rows if row["share"] == share]
        mine = next(row for row in here if row["who"] == "colouring")
        better = [r for r in here if r["cosine"] > mine["cosine"] + 5e-5]
        gap = f"{mine['gap']:.2%}" if mine["gap"] is not None else "unknown"
        text = f"- {1 - share:.0%} fewer: predicted cost {mine['cost']:.3g}, optimality gap {gap}"
        others = [r for r in here if r["curvature"] == mine["curvature"] and r is not mine]
        text += "; of " + ", ".join(f"{r['who']} {r['cost']:.3g}" for r in others)
        if better:
            text += ". Measured better: " + ", ".join(r["who"] for r in better)
        lines.append(text + ".")
    return "\n".join(lines) + "\n"


def _classes(rows: Sequence[dict[str, Any]]) -> str:
    """Which layers share at each size."""
    lines = [
        "What the colouring lets share (layers in parentheses share a basis of that rank):",
        "",
    ]
    for row in rows:
        if row["classes"] is None:
            continue
        lines.append(f"- {1 - row['share']:.0%} fewer:")
        for part in row["classes"]:
            texts = [_class_text(one) for one in part["classes"]]
            roles = " + ".join(_short(role) for role in part["name"].split(" + "))
            lines.append(f"  - {roles}: {', '.join(texts)}")
    return "\n".join(lines) + "\n"


def _short(role: str) -> str:
    return role.rpartition("*.")[2].removesuffix(".weight")


def _class_text(one: dict[str, Any]) -> str:
    numbers = dict.fromkeys(name.split("layer.")[1].split(".")[0] for name in one["layers"])
    layers = " ".join(numbers)
    if not one["rank"]:
        return f"{layers} in full"
    return f"({layers}) {one['rank']}" if len(numbers) > 1 else f"{layers}: {one['rank']}"


def _costs(rows: Sequence[dict[str, Any]]) -> str:
    table = [
        [f"{row['width']}", f"{row['inputs_s']:.3f}", f"{row['kronecker_s']:.3f}"] for row in rows
    ]
    last = rows[-1]
    grown = 496 * (4096 / last["width"]) ** 3 / 3600
    table.append(
        [
            "4096, 496 pairs, on paper",
            f"{last['inputs_s'] * grown:.1f} h",
            f"{last['kronecker_s'] * grown:.1f} h",
        ]
    )
    return _table(["width", "`inputs`", "`outputs`, `kfac`"], table)


def main() -> int:
    """Write the measured part; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    write_text(PAGE, text[: text.index(MARK)] + MARK + "\n" + measured(result))
    sys.stdout.write(f"wrote {PAGE}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
