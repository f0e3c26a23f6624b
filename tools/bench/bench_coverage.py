"""How many models of other people's packages are erased, run and agree; next to Torch-Pruning.

Each of the models in ``tools/bench/coverage`` is captured, analysed, erased at half of its prunable
parameters, run at two batch sizes, and compared with the full-size model in which the erased slices
are zero. Torch-Pruning gets the same model on the same machine. Each try is a process of its own
with limits of CPU time and memory, so that a hang is a row of the table. Source: own.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.coverage.runner import LIMITS, Who, run_all
from torchlathe.tools.bench.coverage.summary import summary, verdict
from torchlathe.tools.bench.coverage.zoo import ENTRIES
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.compat import define_torchvision_ops

__all__ = ["main", "measure"]

RESULTS = Path(__file__).resolve().parent / "results" / "coverage_cpu.json"


def measure(
    names: Sequence[str],
    result: dict[str, Any],
    *,
    path: Path | None = None,
    jobs: int = 1,
    peer: bool = True,
    again: bool = True,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure models, and put their rows into a result.

    Args:
        names: Names of the models.
        result: What there is already; rows are added under ``"models"``.
        path: File that is written after each row, at once or not at all.
        jobs: Processes at once.
        peer: Whether Torch-Pruning is measured too.
        again: Whether rows that are there already are measured anew.
        console: Where the progress is shown.
    """
    rows: dict[str, Any] = result.setdefault("models", {})
    who: list[Who] = ["ours", "peer"] if peer else ["ours"]
    tasks = [(n, w) for n in names for w in who if again or w not in rows.get(n, {})]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=len(tasks))

        def done(name: str, who: Who, row: dict[str, Any]) -> None:
            rows.setdefault(name, {})[who] = row
            if path is not None:
                write_text(path, json.dumps(result, indent=1) + "\n")
            error = row.get("error") or ""
            text = f"{name} {who}: {verdict(row) if who == 'ours' else row['outcome']} {error}"
            progress.console.print(text[:200], highlight=False, markup=False)
            progress.advance(bar)

        run_all(
            tasks,
            done,
            jobs=jobs,
            started=lambda name, who: progress.update(bar, description=f"{name} {who}"),
        )
    # In the order of the zoo, whatever was measured first.
    result["models"] = {name: rows[name] for name in ENTRIES if name in rows}
    return result


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m torchlathe.tools.bench.bench_coverage",
        description="Erase half of many models, and compare with their zeroed twins.",
    )
    parser.add_argument(
        "--models", default="*", metavar="PATTERNS", help="names with * and ?, by comma (all)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (1)")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of the file, and measure what it lacks"
    )
    parser.add_argument(
        "--again", action="store_true", help="with --resume: measure the named models anew"
    )
    parser.add_argument(
        "--json", type=Path, default=RESULTS, help=f"file to write ({RESULTS.name})"
    )
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    patterns = options.models.split(",")
    options.names = [n for n in ENTRIES if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    if not options.names:
        packages = sorted({e.package for e in ENTRIES.values()})
        parser.error(f"no model is named {options.models}; names begin with {', '.join(packages)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print a summary and write the JSON file; returns the exit status."""
    options = _arguments(argv)
    define_torchvision_ops()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    result: dict[str, Any] = {"models": {}}
    if options.resume and options.json.exists():
        result = json.loads(options.json.read_text(encoding="utf-8"))
    result = {"benchmark": "coverage", **machine(), "limits_s": LIMITS, **result, **machine()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = measure(
        options.names,
        result,
        path=options.json,
        jobs=options.jobs,
        peer=not options.no_peer,
        again=options.again or not options.resume,
        console=console,
    )
    write_text(options.json, json.dumps(result, indent=1) + "\n")
    for key, value in summary(result["models"]).items():
        console.print(f"{key}: {value}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
