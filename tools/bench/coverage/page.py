"""Writes the page on coverage from the rows of the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchlathe.tools.bench.coverage.summary import captured, ratio, summary, verdict

__all__ = ["coverage_page"]

HEAD = """\
# Models covered

<!-- Written by `python -m torchlathe.tools.bench.pages` from tools/bench/results; do not edit. -->

{models} models that were written elsewhere, each with random weights and made small by its own
options: `python -m torchlathe.tools.bench.bench_coverage`, on {cpu}, one thread each,
torch {torch}, Python {python}. The list of models is in `tools/bench/coverage`.

Each is captured, analysed, erased by `structured-erase{{sparsity=0.5}}` (half of the parameters
that are on an axis which can be erased), run at two batch sizes, and compared with the original
module in which the slices that write to erased indices are zero. Every weight that initialisers
leave at zero, one or almost nothing is drawn anew before, so that no mistake hides behind it. By
default only families whose erasing is exact are erased, so that every row is declared exact.

- torch.export captured {captured} of {models}; of these, **{ok} ({share:.1%}) were erased, ran at
  both batch sizes, agreed and shrank** as far as their pins allow; {by_35_percent} lost 35 % of all
  their parameters or more. {differs} differed.
- Torch-Pruning 1.6 (`MagnitudePruner`, ratio 0.5, on the same machine; layers that make the outputs
  are left alone, heads are told to it and its usual patches applied; a second try without these
  hints where the first fails): **{peer_ok} of {peer}** ({peer_share:.1%}) were pruned, ran, kept
  the shape of their outputs and shrank. {outcomes}
- Over the {both} models that both handle, analysis and erase took a median of **{ratio:.2f}** of
  the time of Torch-Pruning's graph and prune.
- OTO cannot be imported with torch 2.13 (it uses parts of `torch.onnx` that are gone); with patches
  it was reported to build 17 of 37 torchvision models, and 4 of the first 45 of timm.
"""

TABLE = """\
## {title}

"""

COLUMNS = """\
## Columns

*Capture*, *s* and *TP s* are CPU seconds: of the capture, of analysis and erase, and of
Torch-Pruning's graph and prune; the last two are the best of three. *Families* counts those that
can be erased and those that are pinned; *free* is the share of the parameters that are on an axis
which can be erased; *left* is the share of all parameters that is left. A ratio of 0.5 means half
of the channels to Torch-Pruning, so that it leaves fewer. *Error* is the largest difference from
the zeroed original at either batch size, relative to the largest magnitude of the output, in
float32; where rounding grows so much from layer to layer that this exceeds 1e-4, the error in
float64 follows. Limits: {ours} s of CPU time for torchlathe, {peer} s for Torch-Pruning, 6 GB for
each.
"""

_TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "transformers",
    "diffusers": "diffusers",
    "torch": "Layers of torch itself",
    "torch_geometric": "torch_geometric",
}


def coverage_page(result: Mapping[str, Any]) -> str:
    """The page as text.

    Args:
        result: What ``bench_coverage`` wrote.
    """
    models = result["models"]
    total = summary(models)
    outcomes = [f"{count} {_PEER.get(key, key)}" for key, count in total["peer_outcomes"].items()]
    parts = [
        HEAD.format(
            **{**result, **total},
            peer_share=total["peer_ok"] / max(1, total["peer"]),
            outcomes=f"({', '.join(outcomes)}.)",
        )
        if total["ratio"] is not None
        else "",
        COLUMNS.format(**result["limits_s"]),
    ]
    parts += _problems(models)
    for package, title in _TITLES.items():
        rows = {n: row for n, row in models.items() if n.partition("/")[0] == package}
        if rows:
            parts.append(TABLE.format(title=title) + _table(rows))
    return "\n".join(parts)


_PEER = {
    "ok": "fine",
    "prune": "fail while the graph is built or pruned",
    "run": "fail when the pruned model is run",
    "nothing erased": "silently keep everything",
    "other output shape": "return another shape",
    "timeout": "give no answer in time",
    "killed": "are killed",
}


def _problems(models: Mapping[str, Any]) -> list[str]:
    ours = {name: row["ours"] for name, row in models.items() if "ours" in row}
    failed = [
        f"- {name}: {verdict(row)}" + (f": {_brief(row['error'])}" if row.get("error") else "")
        for name, row in ours.items()
        if captured(row) and verdict(row) != "ok"
    ]
    parts = []
    if failed:
        parts += ["## Captured, but not handled\n", "\n".join(failed) + "\n"]
    missing = [f"- {n}: {_brief(row['error'])}" for n, row in ours.items() if not captured(row)]
    if missing:
        parts += ["## Not captured by torch.export\n", "\n".join(missing) + "\n"]
    return parts


def _brief(error: str) -> str:
    """The message without where and what next."""
    text = error.partition(" where: ")[0].partition(" next: ")[0]
    return text.replace("|", "/").replace("<", "&lt;")[:240]


def _table(rows: Mapping[str, Any]) -> str:
    header = [
        *("model", "parameters", "nodes", "capture", "families", "free", "left", "error"),
        *("batches", "s", "TP", "TP left", "TP s", "ratio"),
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for name, row in rows.items():
        ours, peer = row.get("ours", {}), row.get("peer", {})
        cells = [name.partition("/")[2], *_ours(ours), *_peer(peer)]
        quotient = ratio(row)
        cells.append(f"{quotient:.2f}" if quotient is not None else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ours(row: Mapping[str, Any]) -> list[str]:
    if "nodes" not in row:
        return [_count(row.get("parameters")), *["-"] * 8]
    ran = row.get("ran_at", [])
    return [
        _count(row["parameters"]),
        str(row["nodes"]),
        f"{row['capture_s']:.1f}",
        f"{row['prunable']} / {row['pinned']}" if "prunable" in row else "-",
        f"{row['free_share']:.0%}" if "free_share" in row else "-",
        f"{row['parameters_after'] / row['parameters']:.0%}" if "parameters_after" in row else "-",
        _error(row) if verdict(row) == "ok" else f"**{verdict(row)}**",
        " ".join(map(str, ran)) if ran else "-",
        f"{row['total_s']:.2f}" if "total_s" in row else "-",
    ]


def _error(row: Mapping[str, Any]) -> str:
    text = f"{row['error_f32']:.0e}"
    return text + (f" ({row['error_f64']:.0e} in float64)" if "error_f64" in row else "")


def _peer(row: Mapping[str, Any]) -> list[str]:
    if not row:
        return ["", "", ""]
    if row["outcome"] != "ok":
        kind = (row.get("error") or "").partition(":")[0]
        name = row["outcome"] + (f", {kind}" if row["outcome"] in ("prune", "run") else "")
        return [name, "-", "-"]
    return ["ok", f"{row['parameters_after'] / row['parameters']:.0%}", f"{row['total_s']:.2f}"]


def _count(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"
