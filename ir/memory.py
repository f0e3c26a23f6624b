"""Memory: whether a run of a program fits into it, and giving it back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.errors import InputError
from torchlathe.ir.extents import as_int, example_sizes, expression
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["available", "fits", "give_back", "peak"]


def give_back() -> None:
    """Return freed memory to the system, where the C library is one that holds on to it.

    glibc keeps what many tensors of different sizes were freed from, and asks for more instead of
    filling the gaps: a rewrite and the check after it would peak at the sum of both.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    with contextlib.suppress(OSError, AttributeError):
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
        return found
    return None


def fits(
    program: Program, inputs: tuple[Sequence[Any], Mapping[str, Any]], dtype: torch.dtype
) -> bool:
    """Whether a run in this dtype fits into what memory is free."""
    free = available(program)
    # Half of it, since ops need scratch space and others may use the machine as well.
    return free is None or peak(program, inputs, dtype) <= free // 2


def peak(
    program: Program, inputs: tuple[Sequence[Any], Mapping[str, Any]], dtype: torch.dtype
) -> int:
    """Bytes of the largest set of values that are alive at once, each made at its first use."""
    sizes = example_sizes(program, inputs)
    first: dict[fx.Node, int] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(program.nodes):
        if info(node).tensor is None:
            first.setdefault(node, index)
        for used in node.all_input_nodes:
            first.setdefault(used, index)
            last[used] = index
    change: dict[int, int] = {}
    for node, start in first.items():
        amount = _bytes(node.meta.get("val"), sizes, dtype)
        end = last.get(node, start) + 1
        change[start] = change.get(start, 0) + amount
        change[end] = change.get(end, 0) - amount
    alive = most = 0
    for index in sorted(change):
        alive += change[index]
        most = max(most, alive)
    return most


def _bytes(value: Any, sizes: Mapping[Any, int], dtype: torch.dtype) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(item, sizes, dtype) for item in value)
    if not isinstance(value, torch.Tensor):
        return 0
    item = dtype.itemsize if value.is_floating_point() else value.dtype.itemsize
    try:
        for extent in value.shape:
            item *= as_int(expression(extent), sizes)
    except InputError:
        return 0  # an extent that the data decides
    return item


def available(program: Program) -> int | None:
    """Free bytes on the device that the program's tensors are on; None if nobody tells."""
    device = next((e.tensor.device for e in program.entries.values()), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
