"""The zoo: every network that torchlathe is held to, by name."""

from __future__ import annotations

from tests.zoo.convnets import CONVNETS
from tests.zoo.library import LIBRARY
from tests.zoo.seqnets import SEQNETS
from tests.zoo.zoo_model import ZooModel

__all__ = ["HANDMADE", "LIBRARY", "MODELS", "ZooModel"]

HANDMADE: tuple[ZooModel, ...] = (*CONVNETS, *SEQNETS)
MODELS: dict[str, ZooModel] = {model.name: model for model in (*HANDMADE, *LIBRARY)}
