"""Writes the measured part of ``docs/sensitivity.md`` from ``results/sensitivity_cpu.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from torchlathe.tools.bench.bench_sensitivity import METHODS, RESULTS
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
weights and whose Gauss-Newton matrix is its Hessian there. The factors have 8 draws per batch. The
methods that run over the data were tried on fewer changes, whose number is in brackets. *Change* is
the median size of the measured change.
"""

COST = """\
### Cost

A BERT-base classifier ({parameters} parameters, random weights), {count} batches of {batch}
sentences of {tokens} tokens; each batch analysed and trained on in turn, medians.
`{options}`, a probe of the Hessian's trace per batch, against a step of AdamW of the model itself,
without dropout. Processor seconds, for other programs ran on the machine.

| | processor seconds per batch | peak memory of a process |
| --- | --- | --- |
| training step | {training} | {training_peak} |
| sensitivity | {sensitivity} | {sensitivity_peak} |
| capture alone | {capture} in all | {capture_peak} |

The ratio is {ratio:.2f} (the target was at most 3): {verdict} Besides, once for any number of
batches, the families take {families}.
"""


def measured(result: dict[str, Any]) -> str:
    """The part of the page as text.

    Args:
        result: The content of the result file.
    """
    parts = [INTRODUCTION.format(**result)]
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
    number = f"{row['changes']} ({row['exact_changes']})"
    cells = [
        f"{row[method]:.3f}" if row[method] >= 0.9 else f"*{row[method]:.3f}*" for method in METHODS
    ]
    return [row["net"], row["kind"], number, f"{row['median_change']:.1e}", *cells]


def _verdict(rows: list[dict[str, Any]]) -> str:
    low = [f"{row['net']}, {row['kind']} ({row['kfac']:.3f})" for row in rows if row["kfac"] < 0.9]
    if not low:
        return "`kfac` is at 0.9 or above in every row.\n"
    return (
        "Numbers below 0.9 are in italics. The default, `kfac`, is below it for: "
        + "; ".join(low)
        + ". Erasing a whole unit is no small change: where the exact Hessian is below 0.9 too, "
        "what is missing is of third order and above, and a tenth of the same change shows it.\n"
    )


def _cost(cost: dict[str, Any]) -> str:
    ratio = cost["ratio"]
    return COST.format(
        parameters=count_text(cost["parameters"]),
        count=cost["batches"],
        batch=cost["batch"][0],
        tokens=cost["batch"][1],
        options=cost["options"],
        training=seconds_text(median(cost["training_s"])),
        sensitivity=seconds_text(median(cost["sensitivity_s"])),
        capture=seconds_text(cost["capture_s"]),
        families=seconds_text(cost["families_s"]),
        ratio=ratio,
        verdict="it is met." if ratio <= 3 else "it is missed.",
        **{
            f"{what}_peak": bytes_text(cost[f"{what}_peak_bytes"])
            for what in ("training", "sensitivity", "capture")
        },
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
