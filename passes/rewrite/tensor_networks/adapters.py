"""Adapters whose matrices are sums of Kronecker products: their tensors and their numbers.

A layer ``y = x H + b`` with ``H = sum_i A_i (x) (s_i t_i)``, ``i`` from 1 to n: the ``A_i``, n x n,
are shared by all layers, and each has its own ``s_i`` (k / n, rank) and ``t_i`` (rank, d / n). An
adapter is two of them with an activation between, beside the identity.

Source: Compacter (arXiv 2106.04647, equations 5 to 7; numbers of parameters section 4). The
variances of the start are own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

__all__ = ["AdapterSize", "KroneckerLayer", "kronecker_layer", "mixing", "whole_matrix"]


@dataclass(frozen=True)
class AdapterSize:
    """Extents of one adapter.

    Attributes:
        width: Of what it is added to.
        inner: Between its two layers.
        terms: Kronecker products in each matrix; divides both.
        rank: Of their second factors.
    """

    width: int
    inner: int
    terms: int
    rank: int

    @property
    def parameters(self) -> int:
        """Elements of both layers with their biases, without what all adapters share."""
        return 2 * self.rank * (self.width + self.inner) + self.inner + self.width

    @property
    def shared(self) -> int:
        """Elements of what all adapters of so many terms share."""
        return self.terms**3


@dataclass(frozen=True)
class KroneckerLayer:
    """The tensors of one layer.

    Attributes:
        left: ``s``, shape (terms, ins / terms, rank).
        right: ``t``, shape (terms, rank, outs / terms).
        bias: Shape (outs,).
    """

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor


def kronecker_layer(
    ins: int, outs: int, terms: int, rank: int, generator: torch.Generator, *, zero: bool = False
) -> KroneckerLayer:
    """A layer to start from: float32, outputs of the size of the inputs, or zero.

    Args:
        ins: Extent of the inputs, a multiple of ``terms``.
        outs: Of the outputs, likewise.
        terms: Kronecker products.
        rank: Of the second factors.
        generator: Of the random numbers.
        zero: Whether the outputs start at zero: ``right`` does, so that its gradient does not.
    """
    left = torch.randn(terms, ins // terms, rank, generator=generator)
    right = torch.randn(terms, rank, outs // terms, generator=generator)
    right = torch.zeros_like(right) if zero else right / sqrt(rank * ins)
    return KroneckerLayer(left, right, torch.zeros(outs))


def mixing(terms: int, generator: torch.Generator) -> torch.Tensor:
    """The ``A_i`` to start from, (terms, terms, terms), with a variance of 1 / terms."""
    return torch.randn(terms, terms, terms, generator=generator) / sqrt(terms)


def whole_matrix(shared: torch.Tensor, layer: KroneckerLayer) -> torch.Tensor:
    """``H``, (ins, outs)."""
    small = layer.left @ layer.right
    product = torch.einsum("iab,icd->acbd", shared, small)
    matrix: torch.Tensor = product.flatten(0, 1).flatten(1, 2)
    return matrix
