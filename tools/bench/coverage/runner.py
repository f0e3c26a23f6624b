"""Runs each measurement in a process of its own, within limits of time and memory.

A fork server imports the packages once, so that a process costs a fork. What hangs, runs out of
memory or crashes becomes a row that says so.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from torchlathe.tools.bench.coverage.entry import Entry

__all__ = ["LIMITS", "Who", "run_all"]

Who = Literal["ours", "peer"]

LIMITS: dict[Who, int] = {"ours": 60, "peer": 30}  # CPU seconds
WALL = 30  # times the limit, by the clock: the machine may have other work
MEMORY = 6 * 2**30  # bytes of address space above what the imports take

Done = Callable[[str, Who, dict[str, Any]], None]


def run_all(
    tasks: Sequence[tuple[str, Who]],
    done: Done,
    *,
    jobs: int = 1,
    started: Callable[[str, Who], None] | None = None,
) -> None:
    """Run measurements, up to ``jobs`` at once.

    Args:
        tasks: Names of models, with who is measured.
        done: Called with each row.
        jobs: Processes at once.
        started: Called when a measurement starts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchlathe.tools.bench.coverage.preload"])
    waiting = list(tasks)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            name, who = waiting.pop(0)
            if started is not None:
                started(name, who)
            running.append(_Running(context, name, who))
        wait([r.pipe for r in running], timeout=0.5)
        for item in list(running):
            if (row := item.poll()) is not None:
                running.remove(item)
                done(item.name, item.who, row)


class _Running:
    """One measurement in its process."""

    def __init__(self, context: Any, name: str, who: Who) -> None:
        self.name, self.who = name, who
        self.pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_measure, args=(name, who, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._start = time.monotonic()
        self._row: dict[str, Any] = {}
        self._open = True

    def poll(self) -> dict[str, Any] | None:
        """The row, if the process is done or over its limit."""
        while self._open and self.pipe.poll():
            try:
                self._row.update(self.pipe.recv())
            except EOFError:
                self._open = False
        late = time.monotonic() - self._start > WALL * LIMITS[self.who]
        if self._open and not late:
            return None
        if late:
            self._process.kill()
        self._process.join()
        code = self._process.exitcode
        if late or code in (-signal.SIGXCPU, -signal.SIGKILL):
            slow = late or code == -signal.SIGXCPU
            self._row["error"] = (
                f"no answer in {LIMITS[self.who]} s of CPU time" if slow else "killed"
            )
            self._row["stage"] = self._row.get("outcome")
            self._row["outcome"] = "timeout" if slow else "killed"
        elif code:
            self._row.setdefault("error", f"the process ended with status {code}")
        self.pipe.close()
        return self._row


def _measure(name: str, who: Who, pipe: Connection) -> None:
    from torchlathe.tools.bench.coverage import ours, peer
    from torchlathe.tools.bench.coverage.zoo import ENTRIES

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not os.environ.get("TORCHLATHE_COVERAGE_DEBUG"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + LIMITS[who], used + LIMITS[who] + 5))
    space = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    entry: Entry = ENTRIES[name]
    try:
        (ours if who == "ours" else peer).measure(entry, pipe.send)
    except Exception as error:
        if os.environ.get("TORCHLATHE_COVERAGE_DEBUG"):
            import traceback

            traceback.print_exc()
        pipe.send({"error": _text(error)})
    pipe.close()
    sys.stdout.flush()
    # Nothing of the interpreter's end belongs to the measurement.
    os._exit(0)


def _text(error: Exception) -> str:
    where = getattr(error, "where", None)
    text = " ".join(str(error).split())[:400]
    if where and str(where) not in text:
        text += f" [{where}]"
    # Where packages are installed is nobody's business.
    text = re.sub(r"\S*/site-packages/", "", text)
    return f"{type(error).__name__}: {text}"


def _address_space() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
