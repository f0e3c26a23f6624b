"""Keeping a lowered program right whose weights were copied when it was made."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from torchlathe.backends.base import FlatCallable, Lowerable
from torchlathe.ir import UnsupportedError

__all__ = ["FrozenRun"]

Slot = tuple[dict[str, Any], str, torch.Tensor, int]


class FrozenRun:
    """A lowered program that is made again when a tensor of the model has changed.

    Loading a state dict or an optimizer step changes tensors; without this, the copies that the
    backend took would go on answering. Looking costs about 0.1 us for each tensor and call.

    Attributes:
        run: The lowered program.
    """

    def __init__(
        self, lower: Callable[[Lowerable], FlatCallable], source: Lowerable, run: FlatCallable
    ) -> None:
        self.run = run
        self._lower = lower
        self._source = source
        self._slots = _slots(source)

    def __call__(self, *inputs: Any) -> Any:
        """Run, after a look at the tensors."""
        for registry, name, tensor, version in self._slots:
            now = registry.get(name)
            if now is not tensor or (version >= 0 and tensor._version != version):
                self.run = self._lower(self._source)
                self._slots = _slots(self._source)
                break
        return self.run(*inputs)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write what the backend made; see ``CompiledModel.export``."""
        write = getattr(self.run, "write", None)
        if write is None:
            raise UnsupportedError(
                "the backend makes no file",
                hint="aoti, onnx, openvino and executorch do; compiled.save keeps every model",
            )
        write(path)


def _slots(source: Lowerable) -> list[Slot]:
    found: list[Slot] = []
    for owner, name in source.places():
        registry = owner._parameters if name in owner._parameters else owner._buffers
        tensor = registry[name]
        assert isinstance(tensor, torch.Tensor)
        found.append((registry, name, tensor, -1 if tensor.is_inference() else tensor._version))
    return found
