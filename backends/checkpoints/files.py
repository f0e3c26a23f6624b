"""The files of a checkpoint: tensors in safetensors, in one piece or several, and a config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchlathe.ir import ArtifactError, InputError
from torchlathe.ir.files import atomic, write_text

__all__ = ["config_of", "tensors_of", "write_folder"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str],
    *,
    shard_bytes: int,
) -> None:
    """Write tensors and texts, each file at once or not at all, and what names others last.

    Args:
        folder: Made if need be.
        tensors: By name.
        texts: Content by file name.
        shard_bytes: Of the tensors of one file; a larger tensor gets one of its own.

    Raises:
        InputError: The folder holds other weights.
        OSError: The file system refuses.
    """
    from safetensors.torch import save_file

    shards = _shards(tensors, shard_bytes)
    names = [_ONE] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    if folder.is_file():
        raise InputError(f"{folder} is a file, and a checkpoint is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    others = {path.name for path in folder.glob("*.safetensors*")} - {*names, _INDEX}
    if others:
        raise InputError(
            f"{folder} holds other weights: {', '.join(sorted(others)[:3])}",
            hint="name a folder of its own for the checkpoint",
        )
    for name, shard in zip(names, shards, strict=True):
        with atomic(folder / name) as draft:
            save_file(shard, draft, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_text(folder / _INDEX, json.dumps(index, indent=1) + "\n")
    else:
        (folder / _INDEX).unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if found[-1] and size + tensor.nbytes > most:
            found.append({})
            size = 0
        found[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    return found


def config_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        InputError: There is none.
        ArtifactError: It is no JSON object.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"the folder {folder} has no config.json", hint="name a checkpoint")
    return _json(file)


def tensors_of(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, one after the other; tensors are mapped into memory.

    Raises:
        InputError: The folder has no weights in safetensors.
        ArtifactError: A file is damaged, or the index names one that is not there.
    """
    from safetensors import SafetensorError, safe_open

    root = Path(folder)
    files = [root / _ONE]
    if (root / _INDEX).is_file():
        places = _json(root / _INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ArtifactError(f"{_INDEX} has no weight_map", where=str(root))
        # A name with a path in it would lead out of the folder.
        files = [root / Path(str(name)).name for name in dict.fromkeys(places.values())]
    elif not files[0].is_file():
        raise InputError(f"{root} has no {_ONE}", hint="weights are read from safetensors alone")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file.name} cannot be read: {error}", where=str(root)) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file.name} is not JSON: {error}", where=str(file)) from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{file.name} is no JSON object", where=str(file))
    return found
