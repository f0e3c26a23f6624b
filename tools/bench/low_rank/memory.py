"""Peak memory of a split over that of the model: for stacks of more and more equal layers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

__all__ = ["memory"]

_WIDTH: Final = 1024
_DEPTHS: Final = (4, 8, 16)


def memory(console: Console) -> Iterator[dict[str, Any]]:
    """A row for each depth and method, measured in a process of its own."""
    for method in ("svd", "whitened-svd"):
        for layers in _DEPTHS:
            command = [sys.executable, "-m", __name__, method, str(layers)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(text.splitlines()[-1])
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
    data = Calibration([x, x], limit_bytes=0)
    after = manager.run(program, calibration=data)
    record = after.history[-1]
    factors = sum(p.numel() * p.element_size() for p in after.parameters.values())
    layer = 4 * _WIDTH * _WIDTH
    return {
        "method": method,
        "layers": layers,
        "layer_bytes": layer,
        "factors_bytes": factors,
        "peak_bytes": record.peak_memory,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], int(sys.argv[2]))))
