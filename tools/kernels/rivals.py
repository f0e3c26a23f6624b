"""What else multiplies by 4-bit weights, where it is installed.

GemLite is imported when it is asked for and not before: importing it allocates on the GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

__all__ = ["gemlite_layer", "has_gemlite"]

log = logging.getLogger("torchlathe")


def has_gemlite(device: torch.device) -> bool:
    """Whether GemLite is there to be timed on the device."""
    return device.type == "cuda" and find_spec("gemlite") is not None


def gemlite_layer(values: Tensor, scales: Tensor, group: int) -> Callable[[Tensor], Tensor] | None:
    """GemLite's layer of the same weights, tuned by itself when it is first called.

    Args:
        values: (out, in) uint8, each below 16, whose zero point is 8.
        scales: (groups, out) fp16.
        group: Weights that share a scale.

    Returns:
        The layer, or None (with a warning) where GemLite cannot be used.
    """
    try:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

        out, columns = values.shape
        layer: Any = GemLiteLinear(
            4,
            group_size=group,
            in_features=columns,
            out_features=out,
            input_dtype=DType.FP16,
            output_dtype=DType.FP16,
        )
        each = scales.t().contiguous().view(-1, 1)
        layer.pack(values, each, torch.full_like(each, 8.0), None)
    except Exception as error:
        # Another's package, of any version: the benchmark does without it and says so.
        log.warning("GemLite is left out: %s: %s", type(error).__name__, error)
        return None
    return layer  # type: ignore[no-any-return]
