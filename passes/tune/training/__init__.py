"""Training a program: the loop that tune passes share.

A `Trainer` works on copies of the parameters; what it is given never changes. `store` puts what
it found into a program.
"""

from torchlathe.passes.tune.training.checkpoints import Checkpoint
from torchlathe.passes.tune.training.data import TrainingData
from torchlathe.passes.tune.training.hooks import Hook, KeepMasks
from torchlathe.passes.tune.training.module import TrainingModule, masks_of_zeros, store
from torchlathe.passes.tune.training.options import TrainingOptions
from torchlathe.passes.tune.training.progress import TrainingResult
from torchlathe.passes.tune.training.trainer import Forward, Objective, Trainer
from torchlathe.passes.tune.training.tune_pass import TrainerPass

__all__ = [
    "Checkpoint",
    "Forward",
    "Hook",
    "KeepMasks",
    "Objective",
    "Trainer",
    "TrainerPass",
    "TrainingData",
    "TrainingModule",
    "TrainingOptions",
    "TrainingResult",
    "masks_of_zeros",
    "store",
]
