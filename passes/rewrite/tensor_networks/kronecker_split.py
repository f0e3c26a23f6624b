"""Layers as sums of Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.network_split import Modes, NetworkSplit
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkKind

__all__ = ["KroneckerSplit"]


@dataclass(frozen=True)
class KroneckerSplit(NetworkSplit):
    """Writes linear layers and 1 x 1 convolutions as ``sum_r A_r (x) B_r``.

    ``A_r`` has the shape (outs / skew, skew) and ``B_r`` (skew, ins / skew): with a skew of 1 this
    is a product of two matrices, with the root of an extent the two-site tensor train. For as many
    parameters it takes ``skew`` times the FLOPs of the former.

    Keeps: shapes and calls of everything else, biases, and ties. Changes: each split parameter
    becomes two cores. A layer is only split where that makes it smaller.

    Source: Van Loan and Pitsianis 1993; the choice of shapes and fitting to the outputs are own.
    """

    name: ClassVar[str] = "kronecker-split"
    kind: ClassVar[NetworkKind] = "kronecker"

    skew: int = field(
        default=2,
        metadata={"help": "the small extent of each factor, which divides outputs and inputs"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: As for every split, or for a skew below 2.
        """
        super().__post_init__()
        if self.skew < 2:
            raise self.refused(
                f"skew is {self.skew}, but must be at least 2", "low-rank-split is a skew of 1"
            )

    def modes(self, site: Site, structures: Modes) -> Modes | None:
        """The skew, and what is left of the extents."""
        return self.plain_modes(site, structures, 2, self.skew)
