"""Measured tiles, kept on disk by device, and the choice of one.

A file holds the entries of one device and one version of Triton. Source: own.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchlathe.ir.cost.latency import cache_directory
from torchlathe.ir.files import write_text
from torchlathe.kernels.tuning.tiles import Problem, Tile, default_tile

__all__ = ["SHIPPED", "TileTable", "forget", "processors_of", "tile_for", "using"]

log = logging.getLogger("torchlathe")

_FORMAT = 1

# Tiles measured on devices by name, as `torchlathe kernels tune --json` writes them.
# None has been measured yet: `default_tile` rules.
SHIPPED: Mapping[str, Mapping[str, Mapping[str, int] | None]] = {}


class TileTable:
    """The tiles of one device.

    Args:
        device: Name of the device.
        triton: Version of Triton.
        directory: Where the file is; None for ``kernels`` in the cache directory.

    Attributes:
        entries: Tile by `Problem.key`; None where the library's product won.
        path: The file.
    """

    def __init__(self, device: str, triton: str, directory: Path | None = None) -> None:
        folder = cache_directory() / "kernels" if directory is None else directory
        name = re.sub(r"[^A-Za-z0-9.]+", "_", f"{device} triton {triton}")
        self.device = device
        self.triton = triton
        self.path = folder / f"{name}.json"
        self.entries: dict[str, Tile | None] = {}
        self._load()

    def tile(self, problem: Problem, processors: int) -> Tile | None:
        """The measured tile, else the shipped one, else the rule's."""
        if problem.key in self.entries:
            return self.entries[problem.key]
        shipped = SHIPPED.get(self.device, {})
        if problem.key in shipped:
            return _tile(shipped[problem.key])
        return default_tile(problem, processors)

    def save(self) -> None:
        """Write the file, at once or not at all.

        Raises:
            OSError: The file system refuses.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.as_dict(), indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """The file's content."""
        entries = {
            key: None if tile is None else asdict(tile)
            for key, tile in sorted(self.entries.items())
        }
        return {
            "format": _FORMAT,
            "device": self.device,
            "triton": self.triton,
            "entries": entries,
        }

    def _load(self) -> None:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] == _FORMAT:
                self.entries = {key: _tile(value) for key, value in data["entries"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # A table only makes things faster: without it the rule still holds.
            log.warning("ignored the tuning table %s: %s", self.path, error)


def _tile(value: Mapping[str, int] | None) -> Tile | None:
    return None if value is None else Tile(**{key: int(size) for key, size in value.items()})


def tile_for(problem: Problem, device: Any) -> Tile | None:
    """The tile for a problem on a CUDA device; None means the library's product."""
    table, processors = _chosen.get() or _of_device(str(device))
    return table.tile(problem, processors)


def processors_of(device: Any) -> int:
    """Multiprocessors of a CUDA device."""
    return (_chosen.get() or _of_device(str(device)))[1]


@contextmanager
def using(table: TileTable, processors: int) -> Iterator[None]:
    """Choose from this table, whatever the device."""
    before = _chosen.get()
    _chosen.set((table, processors))
    try:
        yield
    finally:
        _chosen.set(before)


def forget() -> None:
    """Read the tables again when they are next asked for."""
    _of_device.cache_clear()


_chosen: ContextVar[tuple[TileTable, int] | None] = ContextVar("_chosen", default=None)


@functools.cache
def _of_device(device: str) -> tuple[TileTable, int]:
    import torch

    version = "none"
    with suppress(ImportError):
        import triton

        version = triton.__version__
    if not torch.cuda.is_available():
        # Traced on fake tensors with no device in the machine: the rule for an H100 or H200.
        return TileTable("none", version), 132
    properties = torch.cuda.get_device_properties(device)
    return TileTable(properties.name, version), properties.multi_processor_count
