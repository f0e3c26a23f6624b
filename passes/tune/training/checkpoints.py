"""Checkpoints: nested state as one file of safetensors, without pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchlathe.ir import ArtifactError, InputError
from torchlathe.ir.files import atomic
from torchlathe.passes.tune.training.module import whole

__all__ = ["Checkpoint", "flatten", "unflatten"]


class Checkpoint:
    """The state of one run, in a folder that other runs may share.

    The file is called by a hash of what the run is (its program, options and data), so that a run
    that is started again finds its own, and none other. It is replaced at once or not at all.

    Args:
        folder: Made if it is not there.
        about: What the run is, line by line.

    Raises:
        InputError: The folder cannot be used.
    """

    def __init__(self, folder: str | Path, about: list[str]) -> None:
        digest = hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]
        self.path = Path(folder) / f"training-{digest}.safetensors"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"checkpoint={str(folder)!r} cannot be used as a folder: {error.strerror}",
                hint="name a folder that can be written to",
            ) from error

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the file.

        Args:
            state: Dicts, lists, tuples, numbers, texts, None and tensors, nested in any way.

        Raises:
            InputError: The file system refuses.
        """
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        text = json.dumps(flatten(state, tensors))
        try:
            with atomic(self.path) as draft:
                save_file(tensors, draft, {"state": text, "format": "pt"})
        except OSError as error:
            raise InputError(
                f"a checkpoint cannot be written: {error.strerror or error}",
                where=str(self.path.parent),
                hint="name a folder with more room for checkpoint=",
            ) from error

    def load(self) -> Any:
        """What `save` was given, or None if it never was.

        Raises:
            ArtifactError: A file that is not what `save` wrote.
        """
        if not self.path.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                text = (file.metadata() or {})["state"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return unflatten(json.loads(text), tensors)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise ArtifactError(
                f"the checkpoint cannot be read: {error}",
                where=str(self.path),
                hint="delete the file to begin again",
            ) from error


def flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON has it, its tensors put aside under numbers.

    Sharded tensors are put together, so that every process has to do this together.

    Raises:
        TypeError: Something that is none of these.
    """
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = whole(value).cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[flatten(k, tensors), flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [flatten(item, tensors) for item in value]}
    if isinstance(value, list):
        return [flatten(item, tensors) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        if kind == "tensor":
            return tensors[inner]
        if kind == "tuple":
            return tuple(unflatten(item, tensors) for item in inner)
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in inner}
    return value
