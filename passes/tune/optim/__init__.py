"""Optimizers that train a network to be small; public as ``torchlathe.optim``.

Each wraps a torch optimizer, takes whole zero-invariant groups to exactly zero while it trains,
and leaves a model from which ``structured-erase{zeros=true}`` cuts them without changing any
output.
"""

from torchlathe.passes.tune.optim.h2spg import H2SPG
from torchlathe.passes.tune.optim.half_space import DHSPG, HSPG
from torchlathe.passes.tune.optim.hesso import HESSO
from torchlathe.passes.tune.optim.hesso_cric import HESSOCRIC
from torchlathe.passes.tune.optim.saliency import Saliency
from torchlathe.passes.tune.optim.sparse_optimizer import SparseOptimizer

__all__ = ["DHSPG", "H2SPG", "HESSO", "HESSOCRIC", "HSPG", "Saliency", "SparseOptimizer"]
