"""How long a saved artefact takes to load, against reading its file.

The file is read and loaded once before, so that what is timed is neither the disk nor imports; each
row is of a process of its own. Source: own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text

__all__ = ["loads", "main", "make"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "artifact_cpu.json"
WIDTH: Final = 3200  # a layer of 41 MB


def make(path: Path, megabytes: int) -> bool:
    """Save a stack of linear layers twice, and say whether both files are of the same bytes.

    Args:
        path: Where the artefact stays.
        megabytes: Of its weights, about.
    """
    import torch
    from torch import nn

    import torchlathe as tl

    torch.manual_seed(0)
    count = max(1, round(megabytes * 1e6 / (4 * WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count))).eval()
    compiled = tl.compile(model, (), torch.randn(1, WIDTH), measure_latency=False)
    compiled.save(path)
    again = path.with_name("again.tl")
    compiled.save(again)
    same = path.read_bytes() == again.read_bytes()
    again.unlink()
    return same


def loads(path: Path) -> dict[str, float]:
    """Seconds to read the file, and to load it in each way, in this process."""
    import torchlathe as tl

    ways: dict[str, Callable[[], object]] = {
        "read": path.read_bytes,
        "load": lambda: tl.load(path),
        "mmap": lambda: tl.load(path, mmap=True),
        "mmap, check=False": lambda: tl.load(path, mmap=True, check=False),
    }
    path.read_bytes()
    tl.load(path, mmap=True, check=False)
    found = {}
    for name, way in ways.items():
        start = time.perf_counter()
        kept = way()
        found[name] = time.perf_counter() - start
        del kept
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Save a model, load it several times, and write the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if parsed.one:
        print(json.dumps(loads(parsed.one)))
        return 0
    from torchlathe.tools.bench.machine import machine

    with tempfile.TemporaryDirectory(prefix="torchlathe-artifact-") as folder:
        path = Path(folder) / "model.tl"
        same = make(path, parsed.megabytes)
        size = path.stat().st_size
        command = [sys.executable, "-m", "torchlathe.tools.bench.bench_artifact", "--one"]
        rows = []
        for _ in range(parsed.runs):
            done = subprocess.run([*command, str(path)], stdout=subprocess.PIPE, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in rows[-1].items()))
    result: dict[str, Any] = {"machine": machine(), "bytes": size, "same_bytes": same, "rows": rows}
    write_text(parsed.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
