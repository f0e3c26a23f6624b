"""Sums of products along one axis, a piece at a time, so that nothing goes through memory twice."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Scratch", "sums_along"]

# Elements of a piece: a few of them stay in the cache, and calls are few.
_PIECE = 2**18


class Scratch:
    """Memory for two pieces of each dtype and device, taken once."""

    def __init__(self) -> None:
        self._held: dict[Any, torch.Tensor] = {}

    def of(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors in the shape of another; they are as they were left."""
        key = (like.device, like.dtype)
        held = self._held.get(key)
        if held is None or held.shape[1] < like.numel():
            held = self._held[key] = like.new_empty(2, max(_PIECE, like.numel()))
        first, second = held[:, : like.numel()]
        return first.view(like.shape), second.view(like.shape)


def sums_along(
    x: torch.Tensor, after: torch.Tensor | None, axis: int, scratch: Scratch
) -> torch.Tensor:
    """``sum x^2``, and with ``d = x - after`` also ``sum x d`` and ``sum d^2``.

    Sums are over all axes but one, in the dtype of x, or float32 if that is narrower.

    Args:
        x: Any tensor.
        after: In its shape; None for the first sum alone.
        axis: The axis.
        scratch: Memory for the pieces.

    Returns:
        (1, extent) or (3, extent).
    """
    if not x.dim():
        x, after = x[None], None if after is None else after[None]
    wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    count = 1 if after is None else 3
    found = torch.zeros(count, x.shape[axis], dtype=wide, device=x.device)
    others = tuple(d for d in range(x.dim()) if d != axis)
    step = max(1, _PIECE // max(1, x[:1].numel()))
    # Kernels of other devices run beside each other, and do not need their pieces small.
    step = step if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), step):
        piece = x[start : start + step].to(wide)
        into = found[:, start : start + step] if axis == 0 else found
        difference, product = scratch.of(piece)
        into[0] += _squares(piece, others)
        if after is not None:
            torch.sub(piece, after[start : start + step].to(wide), out=difference)
            into[1] += _sum(torch.mul(piece, difference, out=product), others)
            into[2] += _squares(difference, others)
    return found


def _squares(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    # A norm reads once, where a product is written and read again.
    return (torch.linalg.vector_norm(values, dim=axes) if axes else values).square()


def _sum(values: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    return values.sum(axes) if axes else values
