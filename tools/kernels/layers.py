"""Layers that the benchmarks run: random weights in several copies, and what they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.tuning.tiles import Problem
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16
from torchlathe.tools.kernels.rivals import gemlite_layer, has_gemlite

__all__ = ["LAYERS", "Contest", "Layer", "at_most", "copies_for", "dense", "make_layer"]

_CACHE = 60 * 2**20  # bytes of the largest L2 (H200)
_MOST = 64  # copies, past which more change nothing
FP8 = torch.float8_e4m3fn


_limit: ContextVar[int] = ContextVar("_limit", default=_MOST)


def copies_for(size: int) -> int:
    """Copies of ``size`` bytes that are three times the cache, so that none is found in it."""
    return min(_MOST, _limit.get(), max(2, math.ceil(3 * _CACHE / size)))


@contextmanager
def at_most(copies: int) -> Iterator[None]:
    """Make no more copies than these, where no time is taken."""
    before = _limit.set(copies)
    try:
        yield
    finally:
        _limit.reset(before)


@dataclass(frozen=True)
class Contest:
    """One way to compute a layer, on one copy of its data per call.

    Attributes:
        calls: One call for each copy.
        size: Bytes of weights that one call reads.
    """

    calls: tuple[Callable[[], Tensor], ...]
    size: int


@dataclass(frozen=True)
class Layer:
    """A quantised layer.

    Attributes:
        problem: What tables know it as.
        ours: The op.
        library: What torch has of the same meaning.
        wanted: The result of the first copy in float64.
        integer: Whether the products run at the rate of 8-bit types.
        rivals: What others have of the same meaning, by name, where it is installed.
    """

    problem: Problem
    ours: Contest
    library: Contest
    wanted: Callable[[], Tensor]
    integer: bool
    rivals: dict[str, Contest] = field(default_factory=dict)


def dense(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Contest:
    """``F.linear`` with weights of that type, which is cuBLAS on a GPU."""
    size = n * k * dtype.itemsize
    calls = []
    for _ in range(copies_for(size)):
        x = torch.randn(m, k, dtype=dtype, device=device)
        weight = torch.randn(n, k, dtype=dtype, device=device)
        calls.append(partial(F.linear, x, weight))
    return Contest(tuple(calls), size)


def make_layer(
    op: str, m: int, n: int, k: int, device: torch.device, *, group: int | None = None
) -> Layer:
    """A layer of random weights, and random activations for each copy.

    Args:
        op: A key of `LAYERS`.
        m: Tokens.
        n: Output features.
        k: Input features.
        device: Where it runs.
        group: Weights that share a scale; None for what is usual (128 for W4A16, else a row).
    """
    return LAYERS[op](m, n, k, device, group)


def _w4a16(m: int, n: int, k: int, device: torch.device, group: int | None) -> Layer:
    group = 128 if group is None else group
    size = n * k // 2
    count = copies_for(size)
    packs, inputs, others = [], [], []
    rival = has_gemlite(device) and group > 0
    for _ in range(count):
        values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        groups = 1 if group == 0 else -(-k // group)
        scales = torch.rand(groups, n, device=device).half() * 0.02 + 0.01
        packs.append(w4a16.pack(values, scales, None, group))
        inputs.append(torch.randn(m, k, device=device).half())
        other = gemlite_layer(values, scales, group) if rival else None
        rival = other is not None
        others += [other] if other is not None else []

    def unpacked(i: int) -> Tensor:
        if device.type == "cpu":
            weight = w4a16.dequantised(*packs[i], group).half()
        else:
            weight = w4a16.unpacked(packs[i], group, torch.float16, wrap=lambda kernel: kernel)
        return F.linear(inputs[i], weight[:n, :k])

    return Layer(
        Problem("w4a16", "float16", m, n, k, group),
        _contest(
            lambda i: w4a16.w4a16_linear(inputs[i], *packs[i], None, None, n, group), count, size
        ),
        _contest(unpacked, count, size),
        lambda: w4a16.reference(inputs[0].double(), *packs[0], out_features=n, group=group),
        False,
        {"gemlite": _contest(lambda i: others[i](inputs[i]), count, size)} if rival else {},
    )


def _w8a16(m: int, n: int, k: int, device: torch.device, group: int | None) -> Layer:
    group = group or 0
    size = n * k
    count = copies_for(size)
    packs, inputs = [], []
    for _ in range(count):
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        groups = 1 if group == 0 else -(-k // group)
        scales = torch.rand(groups, n, device=device).half() * 1e-3 + 1e-3
        packs.append(w8a16.pack(values, scales, group))
        inputs.append(torch.randn(m, k, device=device).half())

    def unpacked(i: int) -> Tensor:
        if device.type == "cpu":
            weight = w8a16.dequantised(*packs[i]).half()
        else:
            weight = w8a16.unpacked(packs[i], torch.float16, wrap=lambda kernel: kernel)
        return F.linear(inputs[i], weight[:n, :k])

    return Layer(
        Problem("w8a16", "float16", m, n, k, group),
        _contest(lambda i: w8a16.w8a16_linear(inputs[i], *packs[i], None, None, n), count, size),
        _contest(unpacked, count, size),
        lambda: w8a16.reference(inputs[0].double(), *packs[0], out_features=n),
        False,
    )


def _w8a8(m: int, n: int, k: int, device: torch.device, group: int | None) -> Layer:
    return _rows(m, n, k, device, torch.int8)


def _fp8(m: int, n: int, k: int, device: torch.device, group: int | None) -> Layer:
    return _rows(m, n, k, device, FP8)


def _rows(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> Layer:
    size = n * k
    count = copies_for(size)
    packs = []
    inputs = []
    for _ in range(count):
        values = _eight_bits(n, k, dtype, device)
        packs.append(w8a8.pack(values, torch.rand(n, device=device) * 1e-3 + 1e-3))
        inputs.append((_eight_bits(m, k, dtype, device), torch.rand(m, device=device) + 0.5))

    def library(i: int) -> Tensor:
        x, x_scales = inputs[i]
        product = w8a8.library_product(x, x_scales[:, None], *packs[i], n)
        return product.to(torch.bfloat16)

    op = "w8a8" if dtype == torch.int8 else "fp8"
    return Layer(
        Problem(op, str(dtype).removeprefix("torch."), m, n, k),
        _contest(
            lambda i: w8a8.w8a8_linear(*inputs[i], *packs[i], None, None, n, torch.bfloat16),
            count,
            size,
        ),
        _contest(library, count, size),
        lambda: w8a8.reference(*inputs[0], *packs[0], out_features=n),
        True,
    )


def _w4a8(m: int, n: int, k: int, device: torch.device, group: int | None) -> Layer:
    group = group or 0
    size = n * k // 2
    count = copies_for(size)
    packs, rows, inputs = [], [], []
    for _ in range(count):
        values = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
        groups = 1 if group == 0 else -(-k // group)
        scales = torch.rand(groups, n, device=device) * 0.02 + 0.01
        packs.append(w4a8.pack(values, scales, group))
        rows.append(w8a8.pack(values, scales[0]))
        inputs.append((_eight_bits(m, k, torch.int8, device), torch.rand(m, device=device) + 0.5))

    def library(i: int) -> Tensor:
        # What torch has: the same integers at 8 bits.
        x, x_scales = inputs[i]
        product = w8a8.library_product(x, x_scales[:, None], *rows[i], n)
        return product.to(torch.bfloat16)

    return Layer(
        Problem("w4a8", "int8", m, n, k, group),
        _contest(
            lambda i: w4a8.w4a8_linear(*inputs[i], *packs[i], None, None, n, torch.bfloat16),
            count,
            size,
        ),
        _contest(library, count, 2 * size),
        lambda: w4a8.reference(*inputs[0], *packs[0], out_features=n),
        True,
    )


def _contest(call: Callable[[int], Tensor], count: int, size: int) -> Contest:
    return Contest(tuple(partial(call, i) for i in range(count)), size)


def _eight_bits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return (torch.randn(rows, columns, device=device) * 50).to(dtype)


# Builders by op, in the order of the tables.
LAYERS: dict[str, Callable[[int, int, int, torch.device, int | None], Layer]] = {
    "w4a16": _w4a16,
    "w8a8": _w8a8,
    "fp8": _fp8,
    "w8a16": _w8a16,
    "w4a8": _w4a8,
}
