"""How fast the forms of a layer are on this machine, measured on layers of about the same size.

Results are kept on disk by processor, torch and number of threads, as those of the latency table
are: a second program with layers of the same sizes measures nothing.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from torchlathe.ir.cost.latency import cache_directory
from torchlathe.ir.files import write_text
from torchlathe.kernels import operators
from torchlathe.kernels.dequantize.formats import pack
from torchlathe.kernels.w4a16 import cpu as w4_cpu
from torchlathe.passes.rewrite.lowering.layers import Layer

__all__ = ["Site", "Speeds", "about"]

assert operators is not None  # registers what is timed
log = logging.getLogger("torchlathe")

_ROUNDS = 5
_SLICE = 2e-3  # seconds of one contestant in one round
_FORMAT = 2
_BEHIND = 2.0  # who is so many times slower than the fastest at the first call has lost


class Site(Protocol):
    """What is not a linear layer, and knows itself how it is timed."""

    def key(self, name: str) -> str:
        """What seconds of a form are kept under."""

    def contestant(self, name: str) -> Callable[[], Any]:
        """A call of a form on random data."""


class Speeds:
    """Seconds of one call of each form, by size.

    Args:
        directory: Where the file is; None for ``lowering`` in the cache directory.
        clock: Seconds, for tests.
    """

    def __init__(
        self, directory: Path | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        folder = cache_directory() / "lowering" if directory is None else directory
        import platform

        machine = f"{_processor()} torch {torch.__version__} threads {torch.get_num_threads()}"
        name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{platform.machine()} {machine}")
        self.path = folder / f"{name}.json"
        self.clock = clock
        self.entries: dict[str, float] = {}
        self.measured = 0
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["format"] == _FORMAT:
                self.entries = {str(k): float(v) for k, v in found["entries"].items()}

    def of(self, layer: Layer | Site, names: list[str]) -> dict[str, float]:
        """Seconds of some forms for a layer; ``"dense"`` and ``"stored"`` are forms as well.

        What is missing is measured, all in turn.
        """
        keys = {
            name: _key(layer, name) if isinstance(layer, Layer) else layer.key(name)
            for name in names
        }
        if any(key not in self.entries for key in keys.values()):
            self._measure(layer, keys)
        return {name: self.entries[key] for name, key in keys.items()}

    def save(self) -> None:
        """Write the file, if anything was measured; a folder that cannot be written is no error."""
        if not self.measured:
            return
        data = {"format": _FORMAT, "entries": dict(sorted(self.entries.items()))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(data, indent=1) + "\n")
        except OSError as error:
            log.debug("speeds are not kept: %s", error)

    def _measure(self, layer: Layer | Site, keys: dict[str, str]) -> None:
        self.measured += 1
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            calls = {name: _call_of(layer, name) for name in keys}
            best = dict.fromkeys(calls, inf)
            for name, call in calls.items():
                call()
                start = self.clock()
                call()
                best[name] = max(self.clock() - start, 1e-7)
            counts = {name: max(1, min(200, int(_SLICE / best[name]))) for name in calls}
            slowest = _BEHIND * min(best.values())
            calls = {n: call for n, call in calls.items() if n == "dense" or best[n] <= slowest}
            for _ in range(_ROUNDS):
                for name, call in calls.items():
                    start = self.clock()
                    for _ in range(counts[name]):
                        call()
                    best[name] = min(best[name], (self.clock() - start) / counts[name])
        self.entries |= {key: best[name] for name, key in keys.items()}


def about(extent: int) -> int:
    """An extent that stands for those near to it: erasing gives every layer one of its own.

    Up to 1/16 away, and divided by the same one of 16, 8, 4 and 1, which decides what ops can do.
    """
    if extent <= 256:
        return extent
    divisor = next(d for d in (16, 8, 4, 1) if extent % d == 0)
    step = (1 << (extent.bit_length() - 1)) // 8
    nearest = (extent + step // 2) // step * step
    return nearest if divisor == 16 else nearest + divisor


def _key(layer: Layer, name: str) -> str:
    outs, ins = map(about, layer.shape)
    form, group = layer.format.name, layer.group
    extra = "" if name == "dense" else f"|{form}|{group}|{layer.activations}"
    extra += "|zeros" if layer.node("zeros") is not None and name != "dense" else ""
    return f"{name}|{layer.rows}x{ins}x{outs}|{str(layer.dtype).removeprefix('torch.')}{extra}"


def _call_of(layer: Layer | Site, name: str) -> Callable[[], Any]:
    return _contestant(layer, name) if isinstance(layer, Layer) else layer.contestant(name)


def _contestant(layer: Layer, name: str) -> Callable[[], Any]:
    """A call of a form on random data of the layer's size."""
    ops = torch.ops.torchlathe
    outs, ins = map(about, layer.shape)
    x = torch.randn(layer.rows, ins).to(layer.dtype)
    form, group = layer.format, layer.group
    if name == "dense":
        dense = torch.randn(outs, ins).to(layer.dtype)
        return lambda: F.linear(x, dense)
    codes = torch.randint(0, 2 ** min(form.bits, 7), (outs, ins)).to(form.stored)
    groups = 1 if group == 0 else -(-ins // group)
    if name == "stored":
        values = pack(codes, form)
        kind = torch.float32 if form.scales == "float" else torch.uint8
        scales = (torch.rand(outs, groups) * 100 + 1).to(kind)
        args = (None, None, ins, group, form.name, layer.dtype)

        def stored() -> Any:
            data = x
            if layer.activations is not None:
                data = ops.quantize_dequantize_tokens(x, [-1], layer.activations)
            return F.linear(data, ops.dequantize(values, scales, *args))

        return stored
    if name == "w8a8_linear":
        row = torch.rand(outs)

        def int8() -> Any:
            numbers, scales = ops.quantize_tokens(x, "int8")
            return ops.w8a8_linear(
                numbers, scales, codes, row, None, None, outs, layer.dtype, "none"
            )

        return int8
    if name == "w8a16_cpu_linear":
        row = torch.rand(outs).to(layer.dtype)
        return lambda: ops.w8a16_cpu_linear(x, codes, row, None, None, "none")
    if name == "w4a16_cpu_linear":
        scales = torch.rand(groups, outs).to(layer.dtype)
        weight = w4_cpu.pack_for_cpu(codes, scales, None, group)
        rest = (None, None, outs, w4_cpu.group_for(ins, group), w4_cpu.capability(), "none")
        return lambda: ops.w4a16_cpu_linear(x, *weight, *rest)
    assert name == "w4a8_linear", name
    from torchlathe.kernels.w4a8.op import pack as pack_w4a8

    signed = pack_w4a8(codes.to(torch.int8) - 8, torch.rand(groups, outs), group)

    def int4() -> Any:
        numbers, scales = ops.quantize_tokens(x, "int8")
        return ops.w4a8_linear(numbers, scales, *signed, None, None, outs, layer.dtype, "none")

    return int4


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "cpu"
