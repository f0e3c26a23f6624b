"""Peak memory of this process, without what the system can write to a file by itself."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["PeakMemory", "anonymous_bytes"]


def anonymous_bytes() -> int:
    """Anonymous resident memory as Linux tells it; 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Watches anonymous memory while a block runs, a hundred times a second.

    Attributes:
        before: Bytes at the beginning.
        peak: The most that was seen.
    """

    def __init__(self, interval: float = 0.01) -> None:
        self.interval = interval
        self.before = self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def rise(self) -> int:
        """Bytes of the peak above the beginning."""
        return self.peak - self.before

    def __enter__(self) -> Self:
        self.before = self.peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.peak = max(self.peak, anonymous_bytes())
