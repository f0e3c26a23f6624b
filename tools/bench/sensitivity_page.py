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

VERDICT = """\
Numbers below 0.9 are in italics. The default, `kfac`, is below it for: {rows}.

{third}Where `ggn` is at 0.9 or above and `kfac` is not, second order is enough and its stand-in
is not: `kfac` and `diagonal` leave out the covariance between the tensors of a unit (a convolution
and the norm behind it move the same output), and, for changes of one tensor, what a Kronecker
product or a diagonal cannot hold; which of the two it is, was not measured apart. For units, ask
`unit_costs(family, method="drawn")` where that matters.
"""

THIRD = """\
Where `hessian` is below 0.9 too, the change is not small: what is missing is of third order and
above.

"""

COST = """\
### Cost

A BERT-base classifier ({parameters} parameters, random weights), {count} batches of {batch}
sentences of {tokens} tokens, and as many training steps of AdamW of the model itself, without
dropout. The options were `{options}`.
Processor seconds, medians, for other programs ran on the machine; peak memory is of a process that
does this alone, on one batch with a probe.

| | seconds per batch | to a training step | peak memory |
| --- | --- | --- | --- |
| training step | {training} | 1 | {training_peak} |
| sensitivity, without a probe of the Hessian | {plain} | {ratio_unprobed:.2f} | |
| sensitivity, with a probe | {probed} | {ratio_probed:.2f} | {sensitivity_peak} |
| capture alone | {capture} in all | | {capture_peak} |

64 batches with the default of {samples} probes, composed of these and of the {setup} before the
first batch, take **{ratio:.2f}** times as long as 64 training steps (the target was at most 3).
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
    cells = [_cell(row.get(method)) for method in METHODS]
    return [row["net"], row["kind"], number, f"{row['median_change']:.1e}", *cells]


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.9 else f"*{value:.3f}*"


def _verdict(rows: list[dict[str, Any]]) -> str:
    low = [f"{row['net']}, {row['kind']} ({row['kfac']:.3f})" for row in rows if row["kfac"] < 0.9]
    if not low:
        return "`kfac` is at 0.9 or above in every row.\n"
    third = THIRD if any((row["hessian"] or 1.0) < 0.9 for row in rows) else ""
    return VERDICT.format(rows="; ".join(low), third=third)


def _cost(cost: dict[str, Any]) -> str:
    seconds = cost["batches_s"]
    return COST.format(
        parameters=count_text(cost["parameters"]),
        count=cost["batches"],
        batch=cost["batch"][0],
        tokens=cost["batch"][1],
        training=seconds_text(median(cost["training_s"])),
        plain=seconds_text(median(seconds[::2])),
        probed=seconds_text(median(seconds[1::2])),
        capture=seconds_text(cost["capture_s"]),
        setup=seconds_text(cost["setup_s"]),
        **{k: cost[k] for k in ("options", "samples", "ratio", "ratio_unprobed", "ratio_probed")},
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
