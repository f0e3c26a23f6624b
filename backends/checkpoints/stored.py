"""A linear layer in its stored form: its numbers, and a module that computes with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlathe.kernels.dequantize.formats import Format, decode_scales, format_of
from torchlathe.kernels.dequantize.op import dequantize, quantize_dequantize_tokens

__all__ = ["Stored", "StoredLinear"]


@dataclass(frozen=True)
class Stored:
    """The weight of a linear layer as `torchlathe.kernels.dequantize.op.dequantize` takes it.

    Attributes:
        values: (rows, bytes or columns) as stored.
        scales: (rows, groups) as stored.
        zeros: (rows, groups) zero points in codes, or None.
        total: One more scale for all, shape (), or None.
        columns: Numbers in a row.
        group: Columns that share a scale; 0 for a whole row.
        format: Name of the number format.
        dtype: Floating type that the layer computes in.
        activations: Number format that inputs are rounded to, a scale for each token, or None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    total: Tensor | None
    columns: int
    group: int
    format: str
    dtype: torch.dtype
    activations: str | None = None

    @property
    def form(self) -> Format:
        """The number format."""
        return format_of(self.format)

    @property
    def rows(self) -> int:
        """Outputs of the layer."""
        return self.scales.shape[0]

    @property
    def plain(self) -> bool:
        """Whether the numbers are one to a byte and a row has one scale."""
        return self.group == 0 and self.form.each == 1

    def dequantised(self) -> Tensor:
        """The weight that the numbers stand for, (rows, columns)."""
        columns = 0 if self.form.each == 1 else self.columns
        parts = (self.values, self.scales, self.zeros, self.total)
        found: Tensor = dequantize(*parts, columns, self.group, self.format, self.dtype)
        return found

    def finite(self) -> bool:
        """Whether no scale is NaN or infinite."""
        return bool(
            torch.isfinite(decode_scales(self.scales, self.form, self.total, torch.float32)).all()
        )


class StoredLinear(nn.Module):
    """A linear layer that keeps its numbers, and computes with what they stand for.

    A capture of it is the logical form that the ``quantize`` pass writes: ``dequantize`` before
    the layer, and rounding of its input token by token where that is asked for. Names of tensors
    are those of that pass too: numbers of 8 bits are ``weight``, others ``weight_packed``.

    Args:
        stored: The weight.
        bias: (rows,), or None.
    """

    def __init__(self, stored: Stored, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = stored.columns, stored.rows
        self.group, self.format, self.dtype = stored.group, stored.format, stored.dtype
        self.activations = stored.activations
        self.values_name = "weight" if stored.plain else "weight_packed"
        for name, tensor in (
            (self.values_name, stored.values),
            ("weight_scale", stored.scales),
        ):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self.register_buffer("weight_zero_point", stored.zeros)
        self.register_buffer("weight_global_scale", stored.total)

    @property
    def stored(self) -> Stored:
        """The weight as it is now."""
        values, scales = self._parameters[self.values_name], self._parameters["weight_scale"]
        assert values is not None
        assert scales is not None
        zeros, total = self._buffers["weight_zero_point"], self._buffers["weight_global_scale"]
        return Stored(values, scales, zeros, total, self.in_features, self.group, self.format,
                      self.dtype, self.activations)  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredLinear:
        """Move or cast; scales move, and keep their type, without which numbers mean others."""
        scales, total = self._parameters["weight_scale"], self._buffers["weight_global_scale"]
        move: Any = super()._apply
        move(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        assert scales is not None
        moved = self._parameters["weight_scale"]
        if moved is not None and moved.dtype != scales.dtype:
            kept = scales.detach().to(moved.device)
            self._parameters["weight_scale"] = nn.Parameter(kept, requires_grad=False)
        other = self._buffers["weight_global_scale"]
        if total is not None and other is not None and other.dtype != total.dtype:
            self._buffers["weight_global_scale"] = total.to(other.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """(..., rows) of (..., columns)."""
        if self.activations is not None:
            input = quantize_dequantize_tokens(input, [-1], self.activations)
        return F.linear(input, self.stored.dequantised(), self._parameters["bias"])

    def extra_repr(self) -> str:
        """Sizes and number formats."""
        group = f", group={self.group}" if self.group else ""
        inputs = f", activations={self.activations}" if self.activations else ""
        return f"{self.in_features}, {self.out_features}, {self.format}{group}{inputs}"
