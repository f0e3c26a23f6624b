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

__all__ = ["memory"]

_WIDTH: Final = 1024
_DEPTHS: Final = (4, 16)
_MALLOC: Final = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def memory(console: Console) -> Iterator[dict[str, Any]]:
    """A row for each depth and method, measured in a process of its own."""
    for method in ("svd", "whitened-svd"):
        for layers in _DEPTHS:
            command = [sys.executable, "-m", __name__, method, str(layers)]
            # Freed blocks go back at once, so that what is measured is what is in use.
            settings = os.environ | dict.fromkeys(_MALLOC, "65536")
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=settings)
            row = json.loads(done.stdout.splitlines()[-1])
            console.print(f"{row}")
            yield row


def _measure(method: str, layers: int) -> dict[str, Any]:
    """Bytes by which the peak rose during the pass, and those that the factors take."""
    from torchlathe import PassManager, capture
    from torchlathe.passes.statistics import Calibration

    torch.set_num_threads(1)
    model = nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)]).eval()
    x = torch.randn(64, _WIDTH)
    program = capture(model, (x,))
    spec = f"low-rank-split{{method={method},allocation=uniform,time=false}}"
    manager = PassManager(spec, verify="off")
    # One layer first, so that what is loaded and allocated once is there.
    warm = capture(nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False)), (x,))
    manager.run(warm, calibration=[x])
    with PeakMemory() as watched:
        after = manager.run(program, calibration=Calibration([x, x], limit_bytes=0))
    factors = sum(p.numel() * p.element_size() for p in after.parameters.values())
    layer = 4 * _WIDTH * _WIDTH
    return {
        "method": method,
        "layers": layers,
        "layer_bytes": layer,
        "factors_bytes": factors,
        "peak_bytes": watched.rise,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
