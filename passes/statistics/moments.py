"""Sums over samples from which means, variances and second moments follow."""

from __future__ import annotations

import torch

__all__ = ["Moments"]


class Moments:
    """Running sums of rows of features, in groups that do not mix.

    All in float64: a variance is the difference of two sums, and where the mean is large the digits
    of float32 are used up by it.

    Attributes:
        count: Number of rows seen.
        total: Sum of the rows, shape (groups, extent).
        squares: Sum of their squares, shape (groups, extent).
        products: Sum of ``x x^T``, shape (groups, extent, extent); None if not asked for.
    """

    def __init__(self, *, matrix: bool = False) -> None:
        self.matrix = matrix
        self.count = 0
        self.total = torch.zeros(())
        self.squares = torch.zeros(())
        self.products: torch.Tensor | None = None

    def add(self, rows: torch.Tensor) -> None:
        """Add a batch.

        Args:
            rows: Shape (groups, samples, extent); on any device, of any floating dtype.
        """
        rows = rows.detach().double()
        if not self.count:
            self.total = self.squares = rows.new_zeros(rows.shape[0], rows.shape[2])
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)
        if self.matrix:
            products = rows.transpose(1, 2) @ rows
            self.products = products if self.products is None else self.products.add_(products)

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
        """``E[x x^T]``, shape (groups, extent, extent).

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
