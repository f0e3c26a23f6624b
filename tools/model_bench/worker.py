"""A process that loads one model, runs it a few times, and says how much memory that took."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_CALLS = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task that the first argument holds as JSON."""
    task: dict[str, Any] = json.loads((sys.argv[1:] if argv is None else argv)[0])
    import torch

    # What both kinds of process import, so that the difference is the model's.
    from torchlathe.tools.model_bench.contestants import contestant, inputs_of

    torch.set_num_threads(task["threads"])
    if task["name"] is not None:
        args, kwargs = inputs_of(task["first"], task["inputs"], task["seed"])
        one = contestant(task["name"], args, kwargs, dynamic=task["dynamic"], seed=task["seed"])
        with torch.inference_mode():
            for _ in range(_CALLS):
                one.run(*args, **kwargs)
    sys.stdout.write(f"peak {_peak()}\n")
    return 0


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # What Linux gives by getrusage has the parent's memory in it, from between fork and exec.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes


if __name__ == "__main__":
    sys.exit(main())
