"""Runs commands as processes with limits, some of them side by side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["Job", "run_alone", "run_together"]

_WAIT = 0.05  # seconds between looks


class Job:
    """One command that writes rows of JSON to a file.

    Args:
        name: Of the part.
        command: Program and arguments.
        folder: Where its rows and what it says go.
        seconds: It is killed after so many.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, seconds: float) -> None:
        self.name = name
        self.command = list(command)
        self.seconds = seconds
        self._rows = folder / self.file_of(name)
        self._said = self._rows.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._start = 0.0
        self._failure: str | None = None

    @staticmethod
    def file_of(name: str) -> str:
        """Name of the file of a part's rows."""
        return re.sub(r"[^A-Za-z0-9]+", "_", name) + ".jsonl"

    def begin(self) -> None:
        """Start the process, in a group of its own, so that all of it can be ended."""
        self._start = time.monotonic()
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                self.command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether it is over; kills it when its time is."""
        assert self._process is not None
        if self._process.poll() is not None:
            return True
        if time.monotonic() - self._start > self.seconds:
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the process and what it started."""
        assert self._process is not None
        self._killed = True
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def rows(self) -> list[dict[str, Any]]:
        """What it wrote; a line that it was killed in the middle of is left out."""
        found = []
        with suppress(OSError):
            for line in self._rows.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def failure(self) -> str | None:
        """Why it did not end well, or None."""
        if self._failure is None and self._process is not None:
            self._failure = self._why()
        return self._failure or None

    def _why(self) -> str:
        assert self._process is not None
        status = self._process.returncode
        if status == 0:
            return ""
        if self._killed:
            return f"{self.name}: stopped after {self.seconds:.0f} s"
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        try:
            lines = self._said.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        last = [line for line in lines if line.strip()][-3:]
        return f"{self.name}: {how}: " + " | ".join(line.strip()[:300] for line in last)


def run_alone(job: Job, done: Callable[[Job], None]) -> None:
    """Run one job to its end."""
    run_together([job], time.monotonic() + job.seconds, 1, done)


def run_together(jobs: Sequence[Job], end: float, count: int, done: Callable[[Job], None]) -> None:
    """Run jobs side by side.

    Args:
        jobs: What is to run, in order.
        end: By `time.monotonic`: what runs then is killed, and what waits does not begin.
        count: How many run at once.
        done: Told of each that has ended.
    """
    waiting, running = list(jobs), list[Job]()
    try:
        while waiting or running:
            late = time.monotonic() > end
            while waiting and len(running) < count and not late:
                running.append(waiting.pop(0))
                running[-1].begin()
            for job in [job for job in running if job.ended() or late]:
                if late and not job.ended():
                    job.kill()
                running.remove(job)
                done(job)
            if late and not running:
                return
            time.sleep(_WAIT)
    finally:
        for job in running:
            job.kill()
