"""Writes the measured part of ``docs/sensitivity.md`` from ``results/sensitivity_cpu.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from torchlathe.tools.bench.bench_sensitivity import METHODS, RESULTS, ratios
from torchlathe.tools.figures import bytes_text, count_text, seconds_text

__all__ = ["main", "measured", "updated"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sensitivity.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

INTRODUCTION = """\
Written by `python -m torchlathe.tools.bench.sensitivity_page` from `tools/bench/results`; measured
by `python -m torchlathe.tools.bench.bench_sensitivity` (`--case` for one net, `--cost` for the last
part) on {cpu}, {threads} thread, torch {torch}.

### Predicted and measured changes of the loss

Spearman's rank correlation of the two over changes of each kind, on the same batches. The digits
nets are trained in the benchmark; their loss is the cross-entropy on 256 training images, small but
not stationary. MiniLM is the pretrained sentence encoder on 12 English sentences of Python's
documentation; its loss is the squared distance to its own embeddings, whose gradient is zero at the
weights and whose Gauss-Newton matrix is its Hessian there. The factors have 8 draws per batch.
`drawn` had {vectors}.
`auto` is what is asked by default: `unit_costs` for units that are erased, `predict` for all else.
`ggn` was tried on fewer changes where a second number is given for it, and `hessian` on as many as
the last number says; a correlation of two changes (tensors of the CNN, moved) can only be 1 or -1,
and one of four says little. *Change* is the median size of the measured change.
"""

VERDICT = """\
Numbers below 0.9 are in italics. {default} Of the methods that cost no run, `kfac` is below it for:
{rows}.

{large}{third}Where `ggn` is at 0.9 or above and `kfac` is not, second order is enough and its
stand-in is not: `kfac` and `diagonal` leave out the covariance between the tensors of a unit (a
convolution and the norm behind it move the same output), and, for changes of one tensor, what a
Kronecker product or a diagonal cannot hold; which of the two it is, was not measured apart.
"""

LARGE = """\
To erase a unit is not always a small change: for MiniLM's, even the whole Gauss-Newton matrix is
wrong about the cost by {off:.0%} (median), and ranks them by {whole:.3f}. The same units shrunk by
a tenth are ranked by {small:.3f}.

"""

THIRD = """\
Where `hessian` is below 0.9 too, the change is not small: what is missing is of third order and
above.

"""

COST = """\
### Cost

A BERT-base classifier ({parameters} parameters, random weights) on batches of {batch} sentences of
{tokens} tokens ({batches} of them, half with a probe of the Hessian), and as many training steps of
AdamW of the model itself in the same process, without dropout. The options were
`{options}`. Processor seconds, on a machine where other programs ran.
*Peak memory* is anonymous memory (what is in files can be written out) of a process that does this
alone, on one batch with a probe, with the model and the interpreter in it.

| | per batch | with a probe | to a training step | with a probe | 64 batches | peak memory |
| --- | --- | --- | --- | --- | --- | --- |
| training step | {training} | | 1 | | 1 | {training_peak} |
{limits}

*64 batches* is the ratio for 64 batches with the default of {samples} probes to 64 training steps,
composed of these seconds and of those before the first batch; the target was at most 3.
What a limit below the default saves in memory it costs in time.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    used = {row["net"]: row["drawn_vectors"] for row in result["rows"]}
    vectors = ", ".join(f"{number} vectors for {net}" for net, number in used.items())
    parts = [INTRODUCTION.format(**result, vectors=vectors)]
    header = ["net", "changes", "number", "change", *METHODS]
    rows = [_row(row) for row in result["rows"]]
    parts += [_table(header, rows), _verdict(result["rows"])]
    if result.get("cost"):
        parts.append(_cost(result["cost"]))
    return "\n".join(parts)


def updated(page: str, text: str) -> str:
    """A page with another measured part."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{text.strip()}\n{END}{tail}"


def _row(row: dict[str, Any]) -> list[str]:
    counts = [row["changes"], row["whole_changes"], row["exact_changes"]]
    number = ", ".join(map(str, sorted(set(counts), reverse=True)))
    cells = [_cell(row.get(method)) for method in METHODS]
    return [row["net"], row["kind"], number, f"{row['median_change']:.1e}", *cells]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.9 else f"*{value:.3f}*"


def _verdict(rows: list[dict[str, Any]]) -> str:
    low = {
        name: [row for row in rows if row[name] is not None and row[name] < 0.9]
        for name in ("auto", "kfac")
    }
    texts = {
        name: "; ".join(f"{row['net']}, {row['kind']} ({row[name]:.3f})" for row in found)
        for name, found in low.items()
    }
    default = "The default is at 0.9 or above in every row where it was measured."
    if all(row["auto"] is not None for row in rows):
        default = "The default is at 0.9 or above in every row."
    if low["auto"]:
        default = f"The default is below 0.9 for: {texts['auto']}."
    if not low["kfac"]:
        return f"{default}\n"
    third = THIRD if any((row["hessian"] or 1.0) < 0.9 for row in rows) else ""
    erased = any(row["kind"].startswith("erase") for row in low["auto"])
    large = ""
    of = {row["kind"].partition(" ")[0]: row for row in rows if row["net"] == "MiniLM"}
    if erased and "shrink" in of:
        lost = of["erase"]
        large = LARGE.format(small=of["shrink"]["auto"], whole=lost["ggn"], off=lost["ggn_error"])
    return VERDICT.format(rows=texts["kfac"], default=default, third=third, large=large)


def _cost(cost: dict[str, Any]) -> str:
    lines = []
    rows = sorted(cost["limits"].items(), key=lambda item: -int(item[0]))
    for limit, row in rows:
        times = [""] * 5
        if "plain_s" in row:
            plain, probed, whole = ratios(row)
            seconds = [seconds_text(median(row[key])) for key in ("plain_s", "probed_s")]
            times = [*seconds, f"{plain:.2f}", f"{probed:.2f}", f"**{whole:.2f}**"]
        cells = [
            f"sensitivity, `limit_bytes` {bytes_text(int(limit))}",
            *times,
            bytes_text(row["peak"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0][1]
    timed = [row for _, row in rows if "plain_s" in row]
    steps = [seconds for row in timed for seconds in row["training_s"]]
    return COST.format(
        parameters=count_text(first["parameters"]),
        batch=first["batch"][0],
        tokens=first["batch"][1],
        training=seconds_text(median(steps)),
        options=first["options"],
        samples=first["samples"],
        batches=" and ".join(str(len(row["plain_s"] + row["probed_s"])) for row in timed),
        training_peak=bytes_text(cost["peaks"]["training"]),
        limits="\n".join(lines),
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page; returns the exit status."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = updated(PAGE.read_text(encoding="utf-8"), measured(result))
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
