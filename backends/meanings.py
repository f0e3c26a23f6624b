"""What the ops of torchlathe mean in plain torch, for runtimes that do not know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._library.custom_ops import OPDEFS

from torchlathe.ir import BackendError

__all__ = ["meaning_of"]


def meaning_of(op: Any) -> Callable[..., Any]:
    """The function that an op stands for, on a CPU.

    Raises:
        BackendError: Nobody says what the op means.
    """
    name = f"{op.namespace}::{op._opname}"
    found = OPDEFS.get(name)
    if found is None:
        raise BackendError(f"{name} has no meaning in plain torch here")
    function: Callable[..., Any] = found._init_fn
    return function
