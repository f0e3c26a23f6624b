"""Measurements of what is not a plain layer: norms, low-rank residuals, experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchlathe.kernels.norm_quantise import op as norm
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w4a16_experts import op as experts
from torchlathe.tools.kernels.benching import Ceilings
from torchlathe.tools.kernels.layers import copies_for
from torchlathe.tools.kernels.timing import Clock, time_in_turn

__all__ = ["Extra", "measure_extras"]

_EPS = 1e-6


@dataclass(frozen=True)
class Extra:
    """One measurement against one bar.

    Attributes:
        name: What was measured.
        seconds: Of one call.
        ratio: Of what it is held to.
        other: What that is.
        least: The bar: the least ratio.
    """

    name: str
    seconds: float
    ratio: float
    other: str
    least: float

    @property
    def holds(self) -> bool:
        """Whether the bar is met."""
        return self.ratio >= self.least

    def __str__(self) -> str:
        word = "holds" if self.holds else "MISSED"
        us = self.seconds * 1e6
        return f"{self.name}: {us:.1f} us, {self.ratio:.2f} of {self.other} ({self.least}): {word}"


def measure_extras(
    device: torch.device, clock: Clock, ceilings: Ceilings, *, scale: int = 1
) -> Iterator[Extra]:
    """Measure all of it.

    Args:
        device: Where it runs.
        clock: Takes the time.
        ceilings: Of the machine.
        scale: What sizes are divided by, to try this on a CPU.
    """
    for width in (4096, 8192):
        yield _norm(device, clock, ceilings, max(8, 8192 // scale), width // scale)
    for m in (1, 16):
        yield _low_rank(device, clock, m, 14336 // scale, 4096 // scale)
    yield _experts(device, clock, 16, 2048 // scale, 4096 // scale)


def _norm(device: torch.device, clock: Clock, ceilings: Ceilings, tokens: int, width: int) -> Extra:
    calls: list[Callable[[], Tensor]] = []
    size = 7 * tokens * width  # two inputs and a sum of 2 bytes, and numbers of 1
    weight = torch.rand(width, device=device).bfloat16()
    for _ in range(copies_for(size)):
        x, residual = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
        calls.append(partial(_numbers, x, residual, weight))
    seconds = time_in_turn({"ours": calls}, clock)["ours"].median
    share = size / seconds / ceilings.bytes_per_second
    name = f"add_norm_quantise {tokens}x{width}"
    return Extra(name, seconds, share, "copy bandwidth", 0.8)


def _numbers(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return norm.add_norm_quantise(x, residual, weight, None, _EPS, False, torch.int8)[0]


def _low_rank(device: torch.device, clock: Clock, m: int, n: int, k: int, rank: int = 64) -> Extra:
    plain: list[Callable[[], Tensor]] = []
    with_rank: list[Callable[[], Tensor]] = []
    for _ in range(copies_for(n * k // 2)):
        values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        scales = torch.rand(-(-k // 128), n, device=device).half() * 0.02 + 0.01
        weight = w4a16.pack(values, scales, None, 128)
        x = torch.randn(m, k, device=device).half()
        down = torch.randn(rank, k, device=device).half() / 64
        down, up = w4a16.pad_rank(down, torch.randn(n, rank, device=device).half() / 8)
        plain.append(partial(w4a16.w4a16_linear, x, *weight, None, None, n, 128))
        with_rank.append(
            partial(w4a16.w4a16_low_rank_linear, x, *weight, down, up, None, None, n, 128)
        )
    found = time_in_turn({"plain": plain, "ours": with_rank}, clock)
    ratio = found["plain"].median / found["ours"].median
    name = f"w4a16_low_rank {n}x{k} rank {rank} M={m}"
    return Extra(name, found["ours"].median, ratio, "w4a16's speed", round(1 / 1.15, 2))


def _experts(device: torch.device, clock: Clock, tokens: int, n: int, k: int) -> Extra:
    count, chosen = 32, 4
    slots = tokens * chosen
    expert = torch.arange(slots, device=device) % count
    counts = torch.bincount(expert, minlength=count)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    offsets = torch.cat((zero, counts.cumsum(0))).to(torch.int32)
    order = torch.arange(slots, device=device) // chosen
    values = torch.randint(0, 16, (count, n, k), dtype=torch.uint8, device=device)
    scales = torch.rand(count, -(-k // 128), n, device=device).bfloat16() * 0.02 + 0.01
    weight = experts.pack_experts(values, scales, None, 128)
    x = torch.randn(tokens, k, device=device).bfloat16()
    dense = torch.randn(count, n, k, device=device).bfloat16().transpose(1, 2)
    found = time_in_turn(
        {
            "ours": [
                lambda: experts.w4a16_experts_linear(x, order, offsets, *weight, None, n, 128)
            ],
            "library": [
                lambda: torch._grouped_mm(x.index_select(0, order), dense, offs=offsets[1:])
            ],
        },
        clock,
    )
    ratio = found["library"].median / found["ours"].median
    name = f"w4a16_experts {count} of {n}x{k}, {slots} slots"
    return Extra(name, found["ours"].median, ratio, "bf16 grouped_mm's speed", 2.2)
