"""Sums over samples from which means, variances and second moments follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torchlathe.passes.statistics.accumulators import Accumulator, Allocate

__all__ = ["Moments"]

# Elements of rows that are converted at a time.
_AT_ONCE = 2**23


class Moments(Accumulator):
    """Running sums of rows of features, in groups that do not mix.

    Sums and squares are in float64: a variance is the difference of two sums, and where the mean
    is large the digits of float32 are used up by it. The matrix is in ``dtype``.

    Args:
        matrix: Whether to collect second moments, besides sums and sums of squares.
        dtype: Of the products, and of the multiplication that they come from: float64 or float32.
        allocate: Gives memory for the products: zeros of a shape, a dtype and a device.

    Attributes:
        count: Number of rows seen, or of samples, where `add` was told so.
        total: Sum of the rows, shape (groups, extent).
        squares: Sum of their squares, shape (groups, extent).
        products: Sum of ``x x^T``, shape (groups, extent, extent); None if not asked for.
    """

    def __init__(
        self,
        *,
        matrix: bool = False,
        dtype: torch.dtype = torch.float64,
        allocate: Allocate | None = None,
    ) -> None:
        self.matrix = matrix
        self.dtype = dtype
        self.count = 0
        self.total = torch.zeros(())
        self.squares = torch.zeros(())
        self.products: torch.Tensor | None = None
        self._allocate = allocate or _zeros

    def add(self, rows: torch.Tensor, count: int | None = None) -> None:
        """Add a batch.

        Args:
            rows: Shape (groups, rows, extent); on any device, of any floating dtype.
            count: How many samples the rows are; by default as many as there are rows.
        """
        rows = rows.detach()
        groups, number, extent = rows.shape
        if not self.total.dim():
            self.total = rows.new_zeros(groups, extent, dtype=torch.float64)
            self.squares = self.total
        if self.matrix and self.products is None:
            self.products = self._allocate((groups, extent, extent), self.dtype, rows.device)
        self.count += number if count is None else count
        for part in rows.split(max(1, _AT_ONCE // max(1, groups * extent)), 1):
            self._add(part)

    def _add(self, rows: torch.Tensor) -> None:
        wide = rows.double()
        self.total = self.total + wide.sum(1)
        self.squares = self.squares + wide.square().sum(1)
        if self.products is None:
            return
        rows = wide if self.dtype is torch.float64 else rows.to(self.dtype)
        if self.products.device == rows.device:
            self.products.baddbmm_(rows.transpose(1, 2), rows)
        else:  # it did not fit there
            self.products += (rows.transpose(1, 2) @ rows).to(self.products.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Count, sums and products."""
        state = {"count": torch.tensor(self.count), "total": self.total, "squares": self.squares}
        return state if self.products is None else {**state, "products": self.products}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from these sums; the products go to where new ones would."""
        self.count = int(state["count"])
        self.total, self.squares = state["total"], state["squares"]
        if "products" in state:
            given = state["products"]
            self.products = self._allocate(tuple(given.shape), given.dtype, given.device)
            self.products.copy_(given)

    @property
    def mean(self) -> torch.Tensor:
        """Shape (groups, extent)."""
        return self.total / max(1, self.count)

    @property
    def variance(self) -> torch.Tensor:
        """Sample variance (divided by n - 1), shape (groups, extent)."""
        centred = self.squares - self.total.square() / max(1, self.count)
        return centred.clamp_min(0) / max(1, self.count - 1)

    @property
    def norm(self) -> torch.Tensor:
        """Euclidean norm over all rows, shape (groups, extent)."""
        return self.squares.sqrt()

    @property
    def second(self) -> torch.Tensor:
        """``E[x x^T]``, shape (groups, extent, extent); a new tensor each time.

        Raises:
            ValueError: Made without ``matrix``.
        """
        if self.products is None:
            raise ValueError("second moments were not collected")
        return self.products / max(1, self.count)

    @property
    def covariance(self) -> torch.Tensor:
        """``E[x x^T] - E[x] E[x]^T``, shape (groups, extent, extent)."""
        mean = self.mean
        return self.second - mean[:, :, None] * mean[:, None, :]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)
