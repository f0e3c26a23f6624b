"""What is stored of a quantised matrix, in which types, and how many bytes it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchlathe.kernels.dequantize.formats import Format, format_of

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """The stored parts of any matrix of so many columns.

    Attributes:
        form: The number format.
        columns: Of the matrix.
        group: Columns that share a scale; 0 for a whole row.
        scales: Type that scales are stored in.
        zeros: Whether there are zero points.
        total: Whether there is one more scale for all.
    """

    form: Format
    columns: int
    group: int
    scales: torch.dtype
    zeros: bool
    total: bool

    @classmethod
    def of(
        cls, format: str, columns: int, *, group: int, symmetric: bool, dtype: torch.dtype
    ) -> Layout:
        """What comes of options.

        Args:
            format: Name of the format.
            columns: Of the matrix.
            group: Columns that are to share a scale; 0 for a whole row. A group that spans the
                matrix is a whole row, and a format with blocks has these.
            symmetric: Whether to do without zero points, where the format could have them.
            dtype: Type of the matrix.

        Raises:
            OptionError: There is no such format.
        """
        form = format_of(format)
        group = form.block or (group if group < columns else 0)
        scales = torch.uint8
        if form.scales == "float":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            scales = torch.bfloat16 if group else wide
        zeros = form.integer and not symmetric
        return cls(form, columns, group, scales, zeros, form.scales == "e4m3")

    def nbytes(self, rows: int) -> int:
        """What a matrix of so many rows takes, with scales and zero points."""
        groups = -(-self.columns // self.group) if self.group else 1
        each = self.scales.itemsize + (self.form.stored.itemsize if self.zeros else 0)
        numbers = -(-self.columns // self.form.each) * self.form.stored.itemsize
        return rows * (numbers + groups * each) + (4 if self.total else 0)
