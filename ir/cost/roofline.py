"""A lower bound of how long a call takes: its FLOPs and bytes over what the machine can do.

Source: roofline model (Williams, Waterman, Patterson 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchlathe.ir.cost.arithmetic import is_free, other_flops, reads_rows
from torchlathe.ir.cost.calls import Call
from torchlathe.ir.cost.flops import FLOPS
from torchlathe.ir.cost.timing import Timer, median, samples

__all__ = ["NOMINAL", "Peaks", "measured_peaks", "roofline"]


@dataclass(frozen=True)
class Peaks:
    """What a machine can do.

    Attributes:
        flops: Operations per second of a large matrix product in float32.
        bytes: Bytes per second that a copy reads and writes.
    """

    flops: float
    bytes: float


# One core of a common CPU; where nothing is measured, only the proportions count.
NOMINAL = Peaks(5e10, 1e10)

_DISPATCH = 2e-6  # seconds that calling an op takes, also one that does nothing


def roofline(call: Call, peaks: Peaks) -> float:
    """Seconds of a call with integer extents."""
    if is_free(call):
        return _DISPATCH
    formula = FLOPS.get(call.name)
    flops = (formula(call) if formula is not None else 0) or other_flops(call)
    written = sum(int(out.nbytes) for out in call.outputs)
    inputs = call.inputs
    read = sum(int(value.nbytes) for value in inputs)
    if reads_rows(call) and inputs:
        read += written - int(inputs[0].nbytes)
    return _DISPATCH + max(int(flops) / peaks.flops, (read + written) / peaks.bytes)


def measured_peaks(device: torch.device, timer: Timer) -> Peaks:
    """Time a matrix product of 768 x 768 and a copy of 32 MiB, in turn."""
    edge, count = 768, 2**23
    a, b = (torch.randn(edge, edge, device=device) for _ in range(2))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    with torch.inference_mode():
        product, copy = samples(
            [lambda: a @ b, lambda: target.copy_(source)], timer, rounds=5, cap=0.5
        )
    flops = 2 * edge**3 / max(median(product), 1e-12)
    return Peaks(flops, 2 * source.nbytes / max(median(copy), 1e-12))
