"""What the rows of the coverage benchmark add up to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

__all__ = ["captured", "ratio", "shrinks", "summary", "verdict"]

SHRINK = 0.35  # share of all parameters that must go where the pins allow it
SHARE = 0.5  # what is asked for, of the prunable ones


def captured(row: Mapping[str, Any]) -> bool:
    """Whether torch.export captured the model."""
    return row.get("nodes") is not None


def shrinks(row: Mapping[str, Any]) -> bool:
    """Whether as much went as was asked for, of what the pins allow.

    A unit of a small model is a few per cent of it, so that the share is met to a tenth.
    """
    # What forward never reads is no part of the graph.
    read = row["parameters"] - row.get("unread", 0)
    gone = (row["parameters"] - row["parameters_after"]) / read
    allowed = SHARE * float(row["free_share"])
    return bool(gone >= SHRINK or gone >= 0.9 * allowed - 0.005) and gone > 0


def verdict(row: Mapping[str, Any]) -> str:
    """``ok``, or the first thing that is wrong with our row."""
    if row["outcome"] == "ok":
        return "ok" if shrinks(row) else "does not shrink"
    if row["outcome"] in ("timeout", "killed"):
        return f"{row['outcome']} ({row.get('stage')})"
    return str(row["outcome"])


def ratio(row: Mapping[str, Any]) -> float | None:
    """Our time to Torch-Pruning's where both erased; None elsewhere."""
    ours, peer = row.get("ours", {}), row.get("peer", {})
    if verdict(ours) != "ok" or peer.get("outcome") != "ok" or not peer.get("total_s"):
        return None
    return float(ours["total_s"] / peer["total_s"])


def summary(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all rows."""
    ours = [row["ours"] for row in models.values() if "ours" in row]
    there = [row for row in ours if captured(row)]
    fine = [row for row in there if verdict(row) == "ok"]
    peer = [row["peer"] for row in models.values() if "peer" in row]
    ratios = [r for row in models.values() if (r := ratio(row)) is not None]
    counts: dict[str, int] = {}
    for row in peer:
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    return {
        "models": len(ours),
        "captured": len(there),
        "ok": len(fine),
        "share": len(fine) / max(1, len(there)),
        "by_35_percent": sum(
            1 - row["parameters_after"] / row["parameters"] >= SHRINK for row in fine
        ),
        "differs": sum(row["outcome"] == "differs" for row in ours),
        "peer": len(peer),
        "peer_ok": counts.get("ok", 0),
        "peer_outcomes": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "both": len(ratios),
        "ratio": statistics.median(ratios) if ratios else None,
    }
