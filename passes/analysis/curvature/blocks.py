"""Blocks of a curvature matrix that belong to a family of units: parts of tensors, as vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from torchlathe.passes.analysis.curvature.objective import Objective, Vector
from torchlathe.passes.analysis.curvature.products import Matrix, Mode, Products, dot
from torchlathe.passes.analysis.curvature.traces import TraceEstimate, rademacher

__all__ = ["Block"]


@dataclass(frozen=True, eq=False)
class Block:
    """The block of some elements of some parameters.

    Attributes:
        objective: The loss as a function of these parameters alone.
        chosen: Per parameter, which of its elements; bool, in its shape.
    """

    objective: Objective
    chosen: Mapping[str, torch.Tensor]

    @property
    def like(self) -> Vector:
        """The values of the elements: what its vectors look like."""
        values = self.objective.parameters()
        return {name: values[name][mask] for name, mask in self.chosen.items()}

    def whole(self, part: Mapping[str, torch.Tensor]) -> Vector:
        """A vector of the block as one of the parameters, zero elsewhere."""
        found = {n: torch.zeros_like(t) for n, t in self.objective.parameters().items()}
        for name, mask in self.chosen.items():
            found[name][mask] = part[name].to(found[name])
        return found

    def part(self, whole: Mapping[str, torch.Tensor]) -> Vector:
        """The elements of a vector of the parameters."""
        return {name: whole[name][mask] for name, mask in self.chosen.items()}

    def product(self, products: Products, vector: Mapping[str, torch.Tensor]) -> Vector:
        """The block's product with one of its vectors."""
        return self.part(products(self.whole(vector)))

    def trace(self, matrix: Matrix, mode: Mode, samples: int) -> TraceEstimate:
        """By Hutchinson's probes, so many on each batch.

        Args:
            matrix: Of which matrix.
            mode: How products are computed.
            samples: Probes of a batch.
        """
        products = Products(self.objective, matrix, mode)
        seed = self.objective.ctx.seed
        found = []
        for batch in self.objective:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + batch.index) % 2**63)
            signs = [
                {name: rademacher(value, generator) for name, value in self.like.items()}
                for _ in range(samples)
            ]
            wholes = [self.whole(each) for each in signs]
            results = products.on_batch(batch, wholes)
            found.append([dot(z, r) for z, r in zip(wholes, results, strict=True)])
        return TraceEstimate.of(found)
