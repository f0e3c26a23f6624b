"""Changes of tensors by which compression passes hurt a model, as small pure functions.

Each gives ``after - before``, to be handed to `Sensitivity.predict` under the tensor's name.
"""

from __future__ import annotations

import torch

__all__ = ["erase_delta", "low_rank_delta", "quantise_delta", "tie_delta"]


def erase_delta(tensor: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
    """Zero the slices at some indices of an axis.

    Args:
        tensor: Any shape.
        axis: Along which the slices lie.
        indices: Which, (n,) int64.
    """
    delta = torch.zeros_like(tensor)
    indices = indices.to(tensor.device)
    return delta.index_copy_(axis, indices, -tensor.detach().index_select(axis, indices))


def quantise_delta(tensor: torch.Tensor, bits: int, axis: int | None = 0) -> torch.Tensor:
    """Round to the nearest of ``2^bits - 1`` symmetric steps.

    Args:
        tensor: Any shape.
        bits: At least 2.
        axis: One scale per index of this axis; None for one scale.

    Raises:
        ValueError: Fewer than two bits.
    """
    if bits < 2:
        raise ValueError(f"symmetric rounding needs at least 2 bits, got {bits}")
    tensor = tensor.detach()
    most = 2 ** (bits - 1) - 1
    others = [d for d in range(tensor.dim()) if d != axis]
    size = tensor.abs().amax(others, keepdim=True) if others else tensor.abs()
    scale = torch.where(size > 0, size / most, torch.ones_like(size))
    return (tensor / scale).round().clamp(-most, most) * scale - tensor


def low_rank_delta(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Cut to the nearest matrix of a rank, by the singular value decomposition.

    Args:
        weight: (outs, ...); what follows the first axis counts as one.
        rank: At least 0; nothing changes from the full rank on.
    """
    matrix = weight.detach().flatten(1)
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    # What is left out, so that the full rank gives zeros.
    rest = left[:, rank:] * values[rank:] @ right[rank:]
    delta: torch.Tensor = -rest.to(weight.dtype).reshape(weight.shape)
    return delta


def tie_delta(shared: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Put a shared tensor in the place of a layer's own: ``W_c - W_l``."""
    return shared.detach() - weight.detach()
