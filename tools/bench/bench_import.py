"""What ``import torchlathe`` adds to ``import torch``, in interleaved fresh processes.

Prints one JSON line with the medians in seconds and what torchlathe adds; the exit status is 1
where ``import torchlathe`` adds ``--limit`` seconds or more. Source: own.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

from torchlathe._version import __version__

__all__ = ["Case", "main", "measure"]


@dataclass(frozen=True)
class Case:
    """One way to start Python: ``code`` is timed inside a fresh process."""

    name: str
    code: str


CASES: Final = (
    Case("torch", "import torch"),
    Case("torch + torchlathe", "import torch, torchlathe"),
    Case(
        "torch + every public name",
        "import torch, torchlathe\nfor name in torchlathe.__all__: getattr(torchlathe, name)",
    ),
)


def measure(case: Case) -> float:
    """Run a case once, in a new process.

    Units: seconds, without the start of the interpreter.
    """
    code = (
        f"import time\nstart = time.perf_counter()\n{case.code}\nprint(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(argv: list[str] | None = None) -> int:
    """Run all cases in turn, ``--rounds`` times; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="processes for each case (default 9)")
    parser.add_argument("--limit", type=float, default=0.3, help="seconds that may be added")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for case in CASES:  # fills the file caches and the bytecode
        measure(case)
    times: dict[str, list[float]] = {case.name: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            times[case.name].append(measure(case))
    median = {name: statistics.median(values) for name, values in times.items()}
    added = {name: value - median["torch"] for name, value in median.items() if name != "torch"}
    result = {
        "benchmark": "import",
        "torchlathe": __version__,
        "python": platform.python_version(),
        "rounds": options.rounds,
        "median_s": {name: round(value, 4) for name, value in median.items()},
        "added_s": {name: round(value, 4) for name, value in added.items()},
        "limit_s": options.limit,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return int(added["torch + torchlathe"] >= options.limit)


if __name__ == "__main__":
    sys.exit(main())
