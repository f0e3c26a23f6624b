"""Memory for matrices: up to a limit in memory, and past it in memory-mapped files."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch

from torchlathe.ir import InputError, OptionError

__all__ = ["DEFAULT_LIMIT", "MatrixStore"]

DEFAULT_LIMIT = 2**31


class MatrixStore:
    """Gives tensors of zeros, and knows how much memory they take.

    What does not fit is mapped from a file, so that the system may write it out and take its
    memory. The file is unlinked as soon as it is mapped: nothing is left of it, however the
    process ends, and its space is free again with the last tensor that uses it.

    Args:
        limit_bytes: How much may be in memory, in bytes; 2 GiB by default.
        folder: Where files are made (it is created if need be); by default the system's
            temporary folder, which on some systems is memory itself.

    Attributes:
        held_bytes: What is in memory.
        spilled_bytes: What is in files.

    Raises:
        OptionError: A negative limit.
        InputError: The folder cannot be used.
    """

    def __init__(
        self, limit_bytes: int | None = None, folder: str | os.PathLike[str] | None = None
    ) -> None:
        self.limit_bytes = DEFAULT_LIMIT if limit_bytes is None else limit_bytes
        if self.limit_bytes < 0:
            raise OptionError(f"limit_bytes is {limit_bytes}, but must not be negative")
        self.folder = None if folder is None else usable_folder(folder, "spill")
        self.held_bytes = 0
        self.spilled_bytes = 0

    def zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A tensor of zeros: on the device if it fits, else on the CPU and in a file.

        Raises:
            InputError: There is no room for the file.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.held_bytes + size <= self.limit_bytes:
            self.held_bytes += size
            return torch.zeros(shape, dtype=dtype, device=device)
        mapped = self._map(size, dtype)
        self.spilled_bytes += size
        return mapped.reshape(shape)

    def _map(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        handle, name = tempfile.mkstemp(prefix="torchlathe-", suffix=".spill", dir=self.folder)
        try:
            with os.fdopen(handle, "wb"):
                # A hole in the file would be a crash at the first write to a full disk.
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.truncate(handle, size)
            return torch.from_file(name, shared=True, size=size // dtype.itemsize, dtype=dtype)
        except OSError as error:
            raise InputError(
                f"a matrix of {size / 2**20:.0f} MiB cannot be spilled: {error.strerror}",
                where=str(Path(name).parent),
                hint="name a folder with more room (spill=), or raise limit_bytes",
            ) from error
        finally:
            os.unlink(name)


def usable_folder(folder: str | os.PathLike[str], option: str) -> Path:
    """The folder, which is made if it is not there.

    Raises:
        InputError: It is a file, or cannot be made or written to.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{option}={str(folder)!r} cannot be used as a folder: {error.strerror}",
            hint="name a folder that can be written to",
        ) from error
    if not os.access(path, os.W_OK):
        raise InputError(
            f"{option}={str(folder)!r} cannot be written to",
            hint="name a folder that can be written to",
        )
    return path
