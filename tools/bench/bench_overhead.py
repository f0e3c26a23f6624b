"""What `torchlathe.compile` takes beyond the backend's own compile, at BERT-base's size.

Each run is a process of its own. Without the stage "lower", which is the backend's work and the
check of it; what stays is capture, passes with the verifier's runs, and the report. Source: own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from torchlathe.ir.files import write_text

__all__ = ["main", "once"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "overhead_cpu.json"
PIPELINE: Final = "structured-erase{sparsity=0.3},quantize"


def once(passes: str, backend: str, verify: str, threads: int) -> dict[str, Any]:
    """Compile once in this process.

    Args:
        passes: Text pipeline.
        backend: Text form.
        verify: As `torchlathe.compile` takes it.
        threads: Intra-op.

    Returns:
        Seconds by stage and all together, and CPU seconds of all together.
    """
    import torch

    import torchlathe as tl
    from torchlathe.tools.bench.end_to_end.cases import CASES
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    torch.set_num_threads(threads)
    model = CASES["BERT-base size (4 x 64)"].make()
    args, kwargs = model.example
    wall, cpu = time.perf_counter(), time.process_time()
    made = tl.compile(
        model.module,
        passes,
        args,
        example_kwargs=kwargs,
        backend=backend,
        verify=verify,
        measure_latency=False,
    )
    seconds = time.perf_counter() - wall
    return {
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "overhead": seconds - made.report.stages["lower"],
        "stages": dict(made.report.stages),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Compile several times, and write the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--passes", default=PIPELINE)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--verify", default="fast")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if parsed.one:
        print(json.dumps(once(parsed.passes, parsed.backend, parsed.verify, parsed.threads)))
        return 0
    from torchlathe.tools.bench.machine import machine

    words = ["--passes", parsed.passes, "--backend", parsed.backend, "--verify", parsed.verify]
    words += ["--threads", str(parsed.threads)]
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_overhead", "--one", *words]
    rows = []
    for _ in range(parsed.runs):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(f"{row['overhead']:.1f} s beyond lowering, {row['cpu_seconds']:.1f} CPU s in all")
    result = {
        "machine": machine(),
        "passes": parsed.passes,
        "backend": parsed.backend,
        "verify": parsed.verify,
        "threads": parsed.threads,
        "rows": rows,
    }
    write_text(parsed.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
