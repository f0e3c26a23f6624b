"""Checkpoints that other programs load: the ``compressed-tensors`` format and plain safetensors."""

from torchlathe.backends.checkpoints.backend import Checkpoint
from torchlathe.backends.checkpoints.reading import read_checkpoint
from torchlathe.backends.checkpoints.stored import StoredLinear
from torchlathe.backends.checkpoints.writing import save_checkpoint

__all__ = ["Checkpoint", "StoredLinear", "read_checkpoint", "save_checkpoint"]
