"""Optimizers that train a network to be small; they live in ``torchlathe.passes.tune.optim``."""

from torchlathe.passes.tune.optim import (
    DHSPG,
    H2SPG,
    HESSO,
    HESSOCRIC,
    HSPG,
    Saliency,
    SparseOptimizer,
)

__all__ = ["DHSPG", "H2SPG", "HESSO", "HESSOCRIC", "HSPG", "Saliency", "SparseOptimizer"]
