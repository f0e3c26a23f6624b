"""Rows of a benchmark under keys, in a file that a later call goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.machine import machine

__all__ = ["go_on", "rows_of"]


def rows_of(path: Path, forget: Sequence[str] = ()) -> dict[str, Any]:
    """What is in a file of rows, but for those whose keys begin with one of some parts."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    result["rows"] = {k: v for k, v in result["rows"].items() if k.split("|")[0] not in forget}
    return result


def go_on(
    path: Path,
    result: dict[str, Any],
    wanted: Iterable[tuple[str, Callable[[], Any]]],
    seconds: float,
) -> None:
    """Measure the rows that are missing, and write the file after each.

    Args:
        path: Of the file.
        result: What `rows_of` gave.
        wanted: Keys, and what measures them.
        seconds: Begin no row after so many.
    """
    console, start = Console(stderr=True), time.monotonic()
    result |= machine()
    for key, run in wanted:
        if key in result["rows"]:
            continue
        if time.monotonic() - start > seconds:
            console.print("there is more to measure")
            return
        before = time.monotonic()
        result["rows"][key] = run()
        console.print(f"{key}: {result['rows'][key]} ({time.monotonic() - before:.0f} s)")
        write_text(path, json.dumps(result, indent=1) + "\n")
