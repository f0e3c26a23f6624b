"""Layers as tensor trains (matrix product operators)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.network_split import Modes, NetworkSplit
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkKind

__all__ = ["TensorTrainSplit"]


@dataclass(frozen=True)
class TensorTrainSplit(NetworkSplit):
    """Writes linear layers and 1 x 1 convolutions as tensor trains.

    Keeps: shapes and calls of everything else, biases, and ties. Changes: each split parameter
    becomes one core for each site, of shape (left bond, o_k, i_k, right bond). A layer is only
    split where that makes it smaller.

    Source: CompactifAI (arXiv 2401.14109); fitting to the outputs is own.
    """

    name: ClassVar[str] = "tensor-train-split"
    kind: ClassVar[NetworkKind] = "tensor-train"

    sites: int = field(default=2, metadata={"help": "cores of each layer, 2 to 5"})

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: As for every split, or for other numbers of sites.
        """
        super().__post_init__()
        if not 2 <= self.sites <= 5:
            raise self.refused(f"sites is {self.sites}, but must be from 2 to 5")

    def modes(self, site: Site, structures: Modes) -> Modes | None:
        """Factors that are near to each other."""
        return self.plain_modes(site, structures, self.sites, 2)
