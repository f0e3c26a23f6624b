"""Writing a transformers model with stored layers as a checkpoint that other programs load."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchlathe.backends.checkpoints.coding import numbers_of, to_file
from torchlathe.backends.checkpoints.config import described
from torchlathe.backends.checkpoints.files import write_folder
from torchlathe.backends.checkpoints.names import as_in_files, file_paths
from torchlathe.backends.checkpoints.stored import StoredLinear
from torchlathe.ir import InputError

__all__ = ["SHARD_BYTES", "is_pretrained", "save_checkpoint"]

SHARD_BYTES = 5 * 10**9


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, with a config that it is built from."""
    return hasattr(getattr(module, "config", None), "to_json_string") and hasattr(
        module, "save_pretrained"
    )


def save_checkpoint(
    model: nn.Module, folder: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model of transformers to a folder, its `StoredLinear` layers as stored numbers.

    The folder has ``config.json`` with a ``quantization_config`` of the ``compressed-tensors``
    format, and the tensors in safetensors under the names of the model. ``from_pretrained`` loads
    it where that package is installed, and so do vLLM and `load_checkpoint`. A model without
    stored layers is written as ``save_pretrained`` writes it.

    Args:
        model: Of transformers, such as `load_checkpoint` or ``compiled.module`` of the
            ``checkpoint`` backend gives it.
        folder: Made if need be; a checkpoint that is there is replaced.
        shard_bytes: Tensors of more than this are spread over several files.

    Raises:
        InputError: The model is none of transformers, or the folder holds other weights.
        UnsupportedError: The format has no name for how a layer is stored.
    """
    if not is_pretrained(model):
        raise InputError(
            f"{type(model).__name__} is no model of transformers, whose config a checkpoint needs",
            hint="compiled.save(path) keeps every model",
        )
    stored = {path: m.stored for path, m in model.named_modules() if isinstance(m, StoredLinear)}
    numbers = {path: numbers_of(layer, path) for path, layer in stored.items()}
    names = file_paths(model, _linear(model))
    tensors = as_in_files(model, dict(_dense(model, stored)))
    for path, layer in stored.items():
        for leaf, tensor in to_file(layer, numbers[path]).items():
            tensors[f"{names[path]}.{leaf}"] = tensor
    texts = _texts(model, described(numbers, names) if numbers else None)
    write_folder(Path(folder), tensors, texts, shard_bytes=shard_bytes)


def _linear(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear | StoredLinear)]


def _dense(model: nn.Module, stored: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the state dict that no stored layer's numbers are; tied ones once."""
    own = {f"{path}.{leaf}" for path in stored for leaf in _numbers(model.get_submodule(path))}
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()
    found: dict[str, Tensor] = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in own
    }
    first = {id(tensor): name for name, tensor in reversed(found.items())}
    # transformers fills those that it ties from the others.
    first |= {id(tensor): name for name, tensor in reversed(found.items()) if name not in tied}
    for name, tensor in found.items():
        if first[id(tensor)] == name:
            yield name, tensor.detach()


def _numbers(layer: nn.Module) -> Iterator[str]:
    for name, _ in (*layer.named_parameters(), *layer.named_buffers()):
        if name != "bias":
            yield name


def _texts(model: nn.Module, quantization: dict[str, Any] | None) -> dict[str, str]:
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    kinds = {m.dtype for m in model.modules() if isinstance(m, StoredLinear)} or set(dtypes[:1])
    if len(kinds) == 1:
        config.dtype = str(kinds.pop()).removeprefix("torch.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    data = json.loads(config.to_json_string())
    if quantization is not None:
        data["quantization_config"] = quantization
    texts = {}
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config.json"] = generation.to_json_string()
    # Last, since a folder with a config is taken for a checkpoint.
    return texts | {"config.json": json.dumps(data, indent=2, sort_keys=True) + "\n"}
