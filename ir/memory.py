"""Giving memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


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
