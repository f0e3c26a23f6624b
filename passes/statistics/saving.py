"""The state of a run over the data, kept in a file so that a killed one can go on."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import ArtifactError, InputError, Program
from torchlathe.passes.statistics.accumulators import Accumulator

__all__ = ["StateFile", "batch_digest", "state_key"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass
class StateFile:
    """Where accumulators are saved, in the format of safetensors.

    Attributes:
        path: The file.
        seen: Number of batches in it.
        digest: Of these batches.
    """

    path: Path
    seen: int = 0
    digest: str = ""

    def load(self, accumulators: Mapping[str, Accumulator], device: torch.device) -> None:
        """Restore what was saved, if there is a file.

        Raises:
            ArtifactError: A file that cannot be read.
        """
        self._sweep()
        if not self.path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt", device=str(device)) as file:
                about = file.metadata() or {}
                names = list(file.keys())
                for key, accumulator in accumulators.items():
                    mine = [n for n in names if n.startswith(f"{key}/")]
                    accumulator.restore(
                        {n.removeprefix(f"{key}/"): file.get_tensor(n) for n in mine}
                    )
            self.seen, self.digest = int(about["seen"]), about["digest"]
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ArtifactError(
                f"the state of an interrupted run cannot be read: {error}",
                where=str(self.path),
                hint="delete the file to begin again",
            ) from error

    def save(self, accumulators: Mapping[str, Accumulator], seen: int, digest: str) -> None:
        """Replace the file by the state as it is now, or leave it as it was."""
        tensors = {
            f"{key}/{name}": tensor
            for key, accumulator in accumulators.items()
            for name, tensor in (accumulator.state() or {}).items()
        }
        # One for each process: two that save into one file would mix their states.
        partial = self.path.with_name(f"{self._draft}{os.getpid()}.partial")
        try:
            _write(partial, tensors, {"seen": str(seen), "digest": digest})
            os.replace(partial, self.path)
        except OSError as error:
            raise InputError(
                f"the state of the run cannot be saved: {error.strerror}",
                where=str(self.path.parent),
                hint="name a folder with more room for resume=",
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        self.seen, self.digest = seen, digest

    @property
    def _draft(self) -> str:
        """What the name of a draft of this machine begins with."""
        return f"{self.path.stem}.{platform.node()}."

    def _sweep(self) -> None:
        """Remove what killed processes of this machine left."""
        if os.name != "posix":  # elsewhere signal 0 is no question
            return
        for left in self.path.parent.glob(f"{glob.escape(self._draft)}*.partial"):
            number = left.name.removeprefix(self._draft).removesuffix(".partial")
            if number.isdigit() and not _alive(int(number)):
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> None:
    """One tensor after the other, where safetensors' own writer would copy them all first."""
    header: dict[str, Any] = {"__metadata__": dict(about)}
    offset = 0
    # The widest first, so that each is aligned.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        kind, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())


def _bytes(tensor: torch.Tensor) -> Any:
    """What a file and a hash can read without another copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def state_key(program: Program, watched: Iterable[str]) -> str:
    """A hash of what a program computes and of what is watched, the same in each process.

    Args:
        program: Its graph and the values of its tensors count.
        watched: A line for each thing that is collected.
    """
    digest = hashlib.sha256()
    for node in program.graph.nodes:
        digest.update(f"{node.name}|{node.op}|{node.target}|{node.args}|{node.kwargs}\n".encode())
    for name, entry in program.entries.items():
        digest.update(f"{name}|{entry.tensor.dtype}|{tuple(entry.tensor.shape)}\n".encode())
        digest.update(_bytes(entry.tensor))
    for line in watched:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()[:24]


def batch_digest(before: str, batch: Any) -> str:
    """A hash of a batch and of those before it.

    Tensors, arrays, numbers and texts count, in whatever lists and mappings; of other objects only
    their class, for their text may be another one in each process.
    """
    digest = hashlib.sha256(before.encode())
    # Encodings of tokenizers are mappings that the trees of torch do not know.
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    for leaf in pytree.tree_leaves(plain):
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            leaf = torch.from_numpy(np.ascontiguousarray(leaf))
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}|{tuple(leaf.shape)}".encode())
            digest.update(_bytes(leaf))
        elif isinstance(leaf, int | float | complex | str | bytes | None):
            digest.update(repr(leaf).encode())
        else:
            digest.update(type(leaf).__qualname__.encode())
    return digest.hexdigest()[:24]
