"""Correctness, tuning, the table and a verdict on a GPU, in one call of under ten minutes.

Each part runs in a process of its own with a limit of its own, and what it found is written after
each: what one kernel breaks, or what runs out of time, costs no more than itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from torchlathe.ir.errors import Error
from torchlathe.ir.files import write_text
from torchlathe.kernels.tuning.table import TileTable
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.kernels.parts import Part, Setting, parts, run_part
from torchlathe.tools.kernels.processes import Job, run_alone, run_together
from torchlathe.tools.kernels.timing import GraphClock, WallClock, require_gpu
from torchlathe.tools.kernels.verdict import summary

__all__ = ["main", "result_of"]

_MARGIN = 5.0  # seconds between the last row of a part and the end of its process
_BEFORE_TIMING = 0.35  # of all seconds, at most, for what needs no clock


def result_of(rows: Iterable[dict[str, Any]], missing: Sequence[str] = ()) -> dict[str, Any]:
    """What was found, by kind, with a verdict.

    Args:
        rows: Of all parts.
        missing: Parts that have not run.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row["kind"]), []).append(row)
    bars = [bar for kind in ("measurement", "extra") for row in found.get(kind, ())
            for bar in row["bars"]]  # fmt: skip
    wrong = [row for row in found.get("correct", ()) if not row["correct"]]
    failures = [str(row["text"]) for row in found.get("failure", ())]
    return {
        "correct": found.get("correct", []),
        "wrong": wrong,
        "failures": failures,
        "not_run": list(missing),
        "compiled": found.get("compile", []),
        "tuned": found.get("tuned", []),
        "ceilings": found.get("ceilings", []),
        "measurements": [row["measurement"] for row in found.get("measurement", ())],
        "extras": [row["extra"] for row in found.get("extra", ())],
        "bars": bars,
        "verdict": summary(bars),
        "good": bool(bars) and not (wrong or failures or missing)
        and all(bar["holds"] for bar in bars),
    }  # fmt: skip


def _told(result: dict[str, Any]) -> list[str]:
    """The verdict in a few lines."""
    lines = [
        f"WRONG  {row['op']} {row['m']}x{row['n']}x{row['k']}: "
        + str(row.get("failure") or f"error {row['error']:.3g}")
        for row in result["wrong"]
    ]
    lines += [f"FAILED {text}" for text in result["failures"]]
    lines += [f"NOT RUN {name}" for name in result["not_run"]]
    lines += result["verdict"]
    right = len(result["correct"]) - len(result["wrong"])
    held = sum(line.startswith("holds") for line in result["verdict"])
    lines.append(
        f"{right} of {len(result['correct'])} results are right, {len(result['tuned'])} problems "
        f"are tuned, {held} of {len(result['verdict'])} bars hold"
    )
    return lines


class _Report:
    """Collects rows, and writes the file after each part."""

    def __init__(self, path: Path, about: dict[str, Any], chosen: Sequence[Part]) -> None:
        self.path = path
        self.about = about
        self.rows: list[dict[str, Any]] = []
        self.missing = [part.name for part in chosen]
        self.start = time.monotonic()
        self.write()

    def add(self, job: Job) -> None:
        """Take the rows of a part that has ended."""
        self.rows += job.rows()
        if (failure := job.failure()) is not None:
            self.rows.append({"kind": "failure", "text": failure})
        with suppress(ValueError):
            self.missing.remove(job.name)
        self.write()
        word = "ok" if failure is None else failure.replace("\n", " ")[:160]
        _say(f"{time.monotonic() - self.start:5.0f} s  {job.name}: {len(job.rows())} rows, {word}")

    def write(self) -> dict[str, Any]:
        """The file as it stands."""
        result = self.about | result_of(self.rows, self.missing)
        result["seconds"] = time.monotonic() - self.start
        write_text(self.path, json.dumps(result, indent=1) + "\n")
        return result


def _run(parsed: argparse.Namespace, report: _Report, chosen: Sequence[Part]) -> None:
    """Run the parts: first side by side what takes no time, then one after the other the rest."""
    end = report.start + parsed.seconds
    with tempfile.TemporaryDirectory() as folder:

        def job(part: Part, seconds: float) -> Job:
            words = [sys.executable, "-m", "torchlathe.tools.kernels.gpu_check"]
            words += ["--part", part.name, "--seconds", f"{max(1.0, seconds - _MARGIN):.1f}"]
            words += ["--into", folder, *(["--rehearse"] if parsed.rehearse else [])]
            for name in parsed.sabotage:
                words += ["--sabotage", name]
            return Job(part.name, words, Path(folder), seconds)

        first = _BEFORE_TIMING * parsed.seconds
        together = [job(part, first) for part in chosen if not part.alone]
        run_together(together, report.start + first, parsed.jobs, report.add)
        rest = [part for part in chosen if part.alone]
        for i, part in enumerate(rest):
            left = end - time.monotonic()
            limit = left * part.share / sum(other.share for other in rest[i:])
            if limit > 2 * _MARGIN or parsed.rehearse:
                run_alone(job(part, limit), report.add)


def _setting(rehearse: bool, folder: Path) -> Setting:
    """What a part runs on: the GPU, or a CPU and small sizes."""
    if rehearse:
        table = TileTable("rehearsal", "none", folder)
        small = {"shapes": [(64, 128)], "tokens": [1, 3], "scale": 64, "rounds": 2}
        return Setting(torch.device("cpu"), WallClock(), table, 132, **small)  # type: ignore[arg-type]
    import triton

    device = require_gpu()
    properties = torch.cuda.get_device_properties(device)
    table = TileTable(properties.name, triton.__version__)
    return Setting(device, GraphClock(), table, properties.multi_processor_count)


def _part(parsed: argparse.Namespace) -> int:
    """Run one part in this process, and write each row as it comes."""
    folder = Path(parsed.into)
    sabotage = dict(name.split("=") for name in parsed.sabotage).get(parsed.part)
    torch.manual_seed(0)
    with (folder / Job.file_of(parsed.part)).open("w", encoding="utf-8") as file:
        for row in run_part(parsed.part, _setting(parsed.rehearse, folder), parsed.seconds):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if sabotage == "crash":
                os.abort()
            elif sabotage == "hang":
                time.sleep(3600)
            elif sabotage == "raise":
                raise RuntimeError("sabotaged")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/gpu_check", description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all of it (540)")
    parser.add_argument("-o", "--output", default="gpu_check.json", help="where the JSON goes")
    parser.add_argument(
        "--only", default="", help="parts whose names begin with one of these, with commas between"
    )
    parser.add_argument("--list", action="store_true", help="name the parts, and run none")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1),
                        help="processes at once, where no time is taken")  # fmt: skip
    parser.add_argument(
        "--rehearse", action="store_true", help="everything on a CPU, small: times mean nothing"
    )
    for name in ("--part", "--into"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--sabotage", action="append", default=[], help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run on the GPU of this machine; returns the exit status."""
    parsed = _parser().parse_args(argv)
    if parsed.part:
        return _part(parsed)
    begins = tuple(parsed.only.split(",")) if parsed.only else ("",)
    chosen = [part for part in parts() if part.name.startswith(begins)]
    if parsed.list:
        _say("\n".join(part.name for part in chosen))
        return 0
    about: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "device": "cpu"}
    try:
        if not parsed.rehearse:
            about["device"] = torch.cuda.get_device_name(require_gpu())
    except Error as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    report = _Report(Path(parsed.output), about, chosen)
    start = Part("start:launch", 1.0, True)
    if not _starts(parsed, report, start):
        return 2
    _run(parsed, report, chosen)
    result = report.write()
    _say("\n" + "\n".join(_told(result)))
    _say(f"{result['seconds']:.0f} s; all of it is in {parsed.output}")
    return int(not result["good"])


def _starts(parsed: argparse.Namespace, report: _Report, start: Part) -> bool:
    """Launch one kernel: without a compiler for C or a driver nothing else need be tried."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "torchlathe.tools.kernels.gpu_check"]
        words += ["--part", start.name, "--into", folder]
        words += ["--rehearse"] if parsed.rehearse else []
        job = Job(start.name, words, Path(folder), 0.25 * parsed.seconds)
        run_alone(job, report.add)
        failure = job.failure()
    if failure is not None:
        sys.stderr.write(
            f"error: no kernel can be launched here\n{failure}\n"
            "    next:  Triton needs a C compiler (gcc or clang), Python's headers (python3-dev) "
            "and a driver; `python -m torch.utils.collect_env` tells what there is\n"
        )
    return failure is None


if __name__ == "__main__":
    sys.exit(main())
