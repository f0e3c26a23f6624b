"""Measurements of what is not a plain layer: norms, gates, low rank, experts, blocks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.block_sparse import op as block_sparse
from torchlathe.kernels.blocks.launching import pad_rank
from torchlathe.kernels.epilogue import interleave, rows_for
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.norm_quantise import op as norm
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w4a16_experts import op as w4a16_experts
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16_experts import op as w8a16_experts
from torchlathe.tools.kernels.benching import Ceilings
from torchlathe.tools.kernels.further import block_mask, routing
from torchlathe.tools.kernels.layers import copies_for
from torchlathe.tools.kernels.timing import Clock, time_in_turn

__all__ = ["Extra", "measure_extras"]

_EPS = 1e-6
HALF, BRAIN = torch.float16, torch.bfloat16
Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Extra:
    """One measurement against one bar.

    Attributes:
        name: What was measured.
        seconds: Of one call.
        ratio: Of what it is held to.
        other: What that is.
        least: The bar: the least ratio.
        failure: Why it could not be measured.
    """

    name: str
    seconds: float
    ratio: float
    other: str
    least: float
    failure: str = ""

    @property
    def group(self) -> str:
        """The bar without sizes, which measurements are put together by."""
        words = [w for w in self.name.split() if not re.search(r"\d+x\d+|^M=", w)]
        return f"{' '.join(words)}: {self.least} of {self.other}"

    @property
    def holds(self) -> bool:
        """Whether the bar is met."""
        return not self.failure and self.ratio >= self.least

    def __str__(self) -> str:
        if self.failure:
            return f"{self.name}: FAILED: {self.failure}"
        word = "holds" if self.holds else "MISSED"
        us = self.seconds * 1e6
        return f"{self.name}: {us:.1f} us, {self.ratio:.2f} of {self.other} ({self.least}): {word}"


def measure_extras(
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    *,
    scale: int = 1,
    deadline: float | None = None,
) -> Iterator[Extra]:
    """Measure all of it.

    Args:
        device: Where it runs.
        clock: Takes the time.
        ceilings: Of the machine.
        scale: What sizes are divided by, to try this on a CPU.
        deadline: By `time.monotonic`; what is not begun by then is left out.
    """
    for measure in _measures(device, clock, ceilings, scale):
        if deadline is not None and time.monotonic() > deadline:
            return
        try:
            yield from measure()
        except Exception as failure:
            # One op that fails must not cost the others; what a launch broke for good will show.
            text = " ".join(str(failure).split())[-300:]
            name = f"{measure.func.__name__.strip('_')} {measure.args[3:]}"
            yield Extra(name, 0.0, 0.0, "", 0.0, f"{type(failure).__name__}: {text}")


def _measures(
    device: torch.device, clock: Clock, ceilings: Ceilings, scale: int
) -> Iterator[partial[Iterator[Extra]]]:
    n, k = 14336 // scale, 4096 // scale
    for width in (4096, 8192):
        rows = max(8, 8192 // scale)
        yield partial(_norm, device, clock, ceilings, rows, width // scale)
        yield partial(_norm_alone, device, clock, rows, width // scale)
    for m in (1, 16):
        yield partial(_low_rank_term, device, clock, m, n, k)
        yield partial(_gated, device, clock, m, n, k)
        yield partial(_low_rank, device, clock, m, k, k, max(1, 512 // scale))
    yield partial(_experts, device, clock, 16, 2048 // scale, 4096 // scale)
    yield partial(_many_tokens, device, clock, max(16, 4096 // scale), n, k)
    for m in (16, max(16, 4096 // scale)):
        yield partial(_block_sparse, device, clock, m, n, k)


def _against(
    name: str, clock: Clock, calls: dict[str, Calls], least: dict[str, float]
) -> Iterator[Extra]:
    """Time ``ours`` and the others in turn, and hold ours to a bar for each of them."""
    found = time_in_turn(calls, clock)
    ours = found["ours"].median
    for other, bar in least.items():
        yield Extra(name, ours, found[other].median / ours, f"{other}'s speed", bar)


def _norm(
    device: torch.device, clock: Clock, ceilings: Ceilings, tokens: int, width: int
) -> Iterator[Extra]:
    calls: Calls = []
    size = 7 * tokens * width  # two inputs and a sum of 2 bytes, and numbers of 1
    weight = torch.rand(width, device=device).bfloat16()
    for _ in range(copies_for(size)):
        x, residual = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(2))
        calls.append(partial(_numbers, x, residual, weight))
    seconds = time_in_turn({"ours": calls}, clock)["ours"].median
    share = size / seconds / ceilings.bytes_per_second
    name = f"add_norm_quantise {tokens}x{width}"
    yield Extra(name, seconds, share, "copy bandwidth", 0.8)


def _norm_alone(device: torch.device, clock: Clock, tokens: int, width: int) -> Iterator[Extra]:
    """A norm and rounding by torch's own ops, one after the other."""
    calls: dict[str, Calls] = {"ours": [], "a norm and rounding": []}
    weight = torch.rand(width, device=device).bfloat16()
    for _ in range(copies_for(3 * tokens * width)):
        x = torch.randn(tokens, width, device=device).bfloat16()
        calls["ours"].append(partial(_numbers_alone, x, weight))
        calls["a norm and rounding"].append(partial(_norm_then_round, x, weight))
    name = f"norm_quantise {tokens}x{width}"
    yield from _against(name, clock, calls, {"a norm and rounding": 1.6})


def _numbers_alone(x: Tensor, weight: Tensor) -> Tensor:
    return norm.norm_quantise(x, weight, None, _EPS, False, torch.int8)[0]


def _norm_then_round(x: Tensor, weight: Tensor) -> Tensor:
    value = F.rms_norm(x, (x.shape[-1],), weight, _EPS)
    scales = value.abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    return (value / scales).round().to(torch.int8)


def _many_tokens(device: torch.device, clock: Clock, m: int, n: int, k: int) -> Iterator[Extra]:
    """8 bits by the library, which the ops call for many tokens."""
    x = torch.randn(m, k, device=device).half()
    weight = torch.randn(n, k, device=device).half()
    of = torch.rand(m, device=device) * 1e-2
    for dtype in (torch.int8, torch.float8_e4m3fn):
        numbers = (torch.randn(m, k, device=device) * 30).to(dtype)
        rows = w8a8.pack((torch.randn(n, k, device=device) * 30).to(dtype), of.new_ones(n))
        ours = partial(w8a8.w8a8_linear, numbers, of, *rows, None, None, n, BRAIN)
        calls: dict[str, Calls] = {"ours": [ours], "dense fp16": [partial(F.linear, x, weight)]}
        name = f"w8a8 {'int8' if dtype == torch.int8 else 'fp8'} {n}x{k} M={m}"
        yield from _against(name, clock, calls, {"dense fp16": 1.6})


def _numbers(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return norm.add_norm_quantise(x, residual, weight, None, _EPS, False, torch.int8)[0]


def _four(n: int, k: int, device: torch.device) -> w4a16.W4:
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = torch.rand(-(-k // 128), n, device=device).half() * 0.02 + 0.01
    return w4a16.pack(values, scales, None, 128)


def _low_rank_term(
    device: torch.device, clock: Clock, m: int, n: int, k: int, rank: int = 64
) -> Iterator[Extra]:
    calls: dict[str, Calls] = {"w4a16": [], "ours": [], "w4a16 and two layers": []}
    for _ in range(copies_for(n * k // 2)):
        weight, x = _four(n, k, device), torch.randn(m, k, device=device).half()
        down = torch.randn(rank, k, device=device).half() / 64
        tall = torch.randn(n, rank, device=device).half() / 8
        wide, up = pad_rank(down, tall)
        plain = partial(w4a16.w4a16_linear, x, *weight, None, None, n, 128)
        calls["w4a16"].append(plain)
        calls["w4a16 and two layers"].append(partial(_and_two_layers, plain, x, down, tall))
        calls["ours"].append(
            partial(w4a16.w4a16_low_rank_linear, x, *weight, wide, up, None, None, n, 128)
        )
    name = f"w4a16_low_rank {n}x{k} rank {rank} M={m}"
    least = {"w4a16": round(1 / 1.15, 2), "w4a16 and two layers": 1.3}
    yield from _against(name, clock, calls, least)


def _and_two_layers(plain: Callable[[], Tensor], x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return plain() + F.linear(F.linear(x, down), up)


def _multiplied(one: Callable[[], Tensor], two: Callable[[], Tensor]) -> Tensor:
    return one() * two()


def _gated(device: torch.device, clock: Clock, m: int, n: int, k: int) -> Iterator[Extra]:
    """A gate, what it gates, and their product, against two layers of the same type."""
    four: dict[str, Calls] = {"ours": [], "unfused": []}
    eight: dict[str, Calls] = {"ours": [], "unfused": []}
    rows = rows_for(n, "swiglu")
    for _ in range(copies_for(n * k)):
        x = torch.randn(m, k, device=device).half()
        both, gate, up = _four(rows, k, device), _four(n, k, device), _four(n, k, device)
        four["ours"].append(partial(w4a16.w4a16_linear, x, *both, None, None, n, 128, "swiglu"))
        one = partial(w4a16.w4a16_linear, x, *gate, None, None, n, 128, "silu")
        two = partial(w4a16.w4a16_linear, x, *up, None, None, n, 128)
        four["unfused"].append(partial(_multiplied, one, two))
    for _ in range(copies_for(2 * n * k)):
        values = torch.randint(-127, 128, (2, n, k), dtype=torch.int8, device=device)
        scales = torch.rand(2, n, device=device) * 1e-3
        numbers = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        of = torch.rand(m, device=device) * 1e-2
        rows_of = w8a8.pack(interleave(*values), interleave(*scales))
        eight["ours"].append(
            partial(w8a8.w8a8_linear, numbers, of, *rows_of, None, None, n, BRAIN, "swiglu")
        )
        pair = [w8a8.pack(v, s) for v, s in zip(values, scales, strict=True)]
        call = partial(w8a8.w8a8_linear, numbers, of)
        one = partial(call, *pair[0], None, None, n, BRAIN, "silu")
        two = partial(call, *pair[1], None, None, n, BRAIN)
        eight["unfused"].append(partial(_multiplied, one, two))
    yield from _against(f"w4a16 gated {n}x{k} M={m}", clock, four, {"unfused": 1.05})
    yield from _against(f"w8a8 gated {n}x{k} M={m}", clock, eight, {"unfused": 1.05})


def _low_rank(
    device: torch.device, clock: Clock, m: int, n: int, k: int, rank: int
) -> Iterator[Extra]:
    calls: dict[str, Calls] = {"ours": [], "dense fp16": []}
    for _ in range(copies_for(2 * rank * (n + k))):
        x = torch.randn(m, k, device=device).half()
        down = torch.randn(rank, k, device=device).half() / 64
        factors = low_rank.pack(down, torch.randn(n, rank, device=device).half() / 8)
        calls["ours"].append(partial(low_rank.low_rank_linear, x, *factors, None, None, n))
    for _ in range(copies_for(2 * n * k)):
        x = torch.randn(m, k, device=device).half()
        calls["dense fp16"].append(partial(F.linear, x, torch.randn(n, k, device=device).half()))
    least = round(0.8 * n * k / ((n + k) * rank), 2)
    name = f"low_rank {n}x{k} rank {rank} M={m}"
    yield from _against(name, clock, calls, {"dense fp16": least})


def _block_sparse(device: torch.device, clock: Clock, m: int, n: int, k: int) -> Iterator[Extra]:
    """A fifth of the blocks, against the dense product and torch's own format."""
    for size in block_sparse.BLOCKS:
        calls: dict[str, Calls] = {"ours": [], "dense fp16": [], "torch's BSR": []}
        for _ in range(copies_for(n * k * 2 // 5)):
            dense = torch.randn(n, k, device=device) * block_mask(n, k, size, 0.2, device)
            weight, x = dense.half(), torch.randn(m, k, device=device).half()
            blocks = block_sparse.pack(weight, size)
            calls["ours"].append(
                partial(block_sparse.block_sparse_linear, x, *blocks, None, None, n)
            )
            calls["dense fp16"].append(partial(F.linear, x, weight))
            if device.type == "cuda" and n % size == k % size == 0:
                calls["torch's BSR"].append(partial(F.linear, x, weight.to_sparse_bsr(size)))
        least = {"dense fp16": 3.0 if m <= 64 else 2.5}
        if calls["torch's BSR"]:
            least["torch's BSR"] = 1.2
        else:
            del calls["torch's BSR"]
        yield from _against(f"block_sparse {size} {n}x{k} M={m}", clock, calls, least)


def _experts(device: torch.device, clock: Clock, tokens: int, n: int, k: int) -> Iterator[Extra]:
    count, chosen = 32, 4
    slots = tokens * chosen
    offsets, _ = routing(slots, count, device)
    order = torch.arange(slots, device=device) // chosen
    values = torch.randint(0, 16, (count, n, k), dtype=torch.uint8, device=device)
    scales = torch.rand(count, -(-k // 128), n, device=device).bfloat16() * 0.02 + 0.01
    four = w4a16_experts.pack_experts(values, scales, None, 128)
    eight = w8a16_experts.pack_experts(values.to(torch.int8), scales[:, :1])
    x = torch.randn(tokens, k, device=device).bfloat16()
    dense = torch.randn(count, n, k, device=device).bfloat16().transpose(1, 2)
    library: Calls = [lambda: torch._grouped_mm(x.index_select(0, order), dense, offs=offsets[1:])]
    name = f"experts {count} of {n}x{k}, {slots} slots"
    linear = partial(w4a16_experts.w4a16_experts_linear, x, order, offsets, *four, None, n, 128)
    calls: dict[str, Calls] = {"ours": [linear], "bf16 grouped_mm": library}
    yield from _against(f"w4a16 {name}", clock, calls, {"bf16 grouped_mm": 2.2})
    linear = partial(w8a16_experts.w8a16_experts_linear, x, order, offsets, *eight, None, n)
    # Half of the bytes allow twice the speed; of that, the share that the bar of W4 asks for.
    calls = {"ours": [linear], "bf16 grouped_mm": library}
    yield from _against(f"w8a16 {name}", clock, calls, {"bf16 grouped_mm": 1.4})
