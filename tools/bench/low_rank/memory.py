"""Peak memory of a split over that of the model: for stacks of more and more equal layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from torchlathe.tools.bench.memory import PeakMemory

__all__ = ["REFERENCE", "memory"]

# Outputs and inputs of the layers; those with a second extent of their own take turns with their
# transposes.
SHAPES: Final = ((1024, 1024), (2752, 1024))
DEPTHS: Final = (4, 16)
REFERENCE: Final = "torch.linalg.svd"
METHODS: Final = ("svd", "whitened-svd")
_MALLOC: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def memory(console: Console) -> Iterator[dict[str, Any]]:
    """A row for each shape, depth and method, measured in a process of its own."""
    for shape in SHAPES:
        wanted = [(method, depth) for method in METHODS for depth in DEPTHS]
        for method, layers in [(REFERENCE, 1), *wanted]:
            command = [sys.executable, "-m", __name__, method, *map(str, (*shape, layers))]
            # Freed blocks go back at once, so that what is measured is what is in use.
            settings = os.environ | dict.fromkeys(_MALLOC, "65536")
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
            row = json.loads(done.stdout.splitlines()[-1])
            console.print(f"{row}")
            yield row


def _measure(method: str, outs: int, ins: int, layers: int) -> dict[str, Any]:
    """Bytes by which the peak rose during the pass, and those that the factors take."""
    torch.set_num_threads(1)
    told = {"method": method, "shape": [outs, ins], "layers": layers, "layer_bytes": 4 * outs * ins}
    if method == REFERENCE:
        weight = torch.randn(outs, ins)
        torch.linalg.svd(torch.randn(300, 300))
        with PeakMemory(0.002) as watched:
            torch.linalg.svd(weight, full_matrices=False)
        return told | {"factors_bytes": 0, "peak_bytes": watched.rise}
    from torchlathe import PassManager, capture
    from torchlathe.passes.statistics import Calibration

    ends = [(outs, ins) if number % 2 else (ins, outs) for number in range(layers)]
    stack = [nn.Linear(read, given, bias=False) for given, read in ends]
    x = torch.randn(64, ends[0][1])
    program = capture(nn.Sequential(*stack).eval(), (x,))
    spec = f"low-rank-split{{method={method},allocation=uniform,time=false}}"
    manager = PassManager(spec, verify="off")
    # Two layers first, so that what is loaded and allocated once is there.
    manager.run(capture(nn.Sequential(*stack[:2]), (x,)), calibration=[x])
    with PeakMemory(0.002) as watched:
        after = manager.run(program, calibration=Calibration([x, x], limit_bytes=0))
    factors = sum(p.numel() * p.element_size() for p in after.parameters.values())
    return told | {"factors_bytes": factors, "peak_bytes": watched.rise}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:]))))
