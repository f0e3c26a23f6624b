"""Reading a checkpoint of the ``compressed-tensors`` format into the logical form."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchlathe.backends.checkpoints.coding import SUFFIXES, Numbers, from_file
from torchlathe.backends.checkpoints.config import quantised_modules
from torchlathe.backends.checkpoints.files import config_of, tensors_of
from torchlathe.backends.checkpoints.names import file_names, file_paths
from torchlathe.backends.checkpoints.stored import StoredLinear
from torchlathe.ir import ArtifactError, InputError, UnsupportedError

__all__ = ["read_checkpoint"]

_INPUTS = ("input_scale", "input_zero_point", "input_global_scale")


def read_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    round_inputs: bool = True,
) -> nn.Module:
    """A copy of a model whose quantised layers keep the numbers of a checkpoint.

    `torchlathe.load_checkpoint` makes the model from the config, if need be.

    Args:
        folder: What llm-compressor, `save_checkpoint` or another program wrote: ``config.json``
            with a ``quantization_config`` of ``quant_method`` compressed-tensors, and safetensors.
        model: A module with the structure of the checkpoint; it is left as it is, and its
            parameters need no values.
        dtype: That layers compute in; None: that of the parameters.
        round_inputs: Whether layers round their inputs where the config says so.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: No checkpoint there, or one for another model.
        ArtifactError: Files that are damaged, or contradict one another.
        UnsupportedError: Numbers that have no logical form here.
    """
    config = config_of(folder)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        raise InputError(
            f"{folder} has no quantization_config",
            hint="from_pretrained of transformers loads it as it is",
        )
    made = _shapes_of(model)
    kind = dtype or _dtype_of(made)
    layers = quantised_modules(quantization, made, round_inputs=round_inputs)
    left = _fill(made, folder, layers, dtype)
    for path, numbers in layers.items():
        old: Any = made.get_submodule(path)
        stored = from_file(left.pop(path, {}), numbers, kind, path)
        if (stored.rows, stored.columns) != (old.out_features, old.in_features):
            raise ArtifactError(
                f"the layer is {stored.rows} x {stored.columns}, and the config says "
                f"{old.out_features} x {old.in_features}",
                where=path,
            )
        if not stored.finite():
            raise ArtifactError("scales are not finite", where=path)
        made.set_submodule(path, StoredLinear(stored, old.bias))
    if callable(tie := getattr(made, "tie_weights", None)):
        tie()
    missing = [n for n, t in (*made.named_parameters(), *made.named_buffers()) if t.is_meta]
    if missing:
        raise ArtifactError(
            f"the files have no {', '.join(missing[:4])}",
            where=str(folder),
            hint="the checkpoint is of another architecture, or not whole",
        )
    return made.eval()


def _fill(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layers: Mapping[str, Numbers],
    dtype: torch.dtype | None,
) -> dict[str, dict[str, Tensor]]:
    """Give floating tensors to a model; those of quantised layers are returned, by their paths."""
    left: dict[str, dict[str, Tensor]] = {}
    unknown = []
    names = {b: a for a, b in file_names(model, model.state_dict()).items()}
    paths = {b: a for a, b in file_paths(model, layers).items()}
    for given, tensor in tensors_of(folder):
        path, _, leaf = names.get(given, given).rpartition(".")
        path = paths.get(path, path)
        if path in layers and leaf in SUFFIXES:
            left.setdefault(path, {})[leaf] = tensor
        elif path in layers and leaf == "weight_g_idx":
            raise UnsupportedError("columns are in another order (g_idx)", where=path)
        elif path in layers and leaf in _INPUTS and layers[path].activations is None:
            continue  # scales of inputs that stay as they are
        elif not _put(model, path, leaf, tensor, dtype):
            unknown.append(given)
    if unknown:
        raise InputError(
            f"{type(model).__name__} has no {', '.join(unknown[:4])}",
            where=str(folder),
            hint="name the module that the checkpoint is of",
        )
    return left


def _put(model: nn.Module, path: str, leaf: str, tensor: Tensor, dtype: torch.dtype | None) -> bool:
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    for registry in (owner._parameters, owner._buffers):
        old: Any = registry.get(leaf)
        if old is None:
            continue
        if old.shape != tensor.shape:
            raise ArtifactError(
                f"the tensor is {tuple(tensor.shape)}, and the config says {tuple(old.shape)}",
                where=f"{path}.{leaf}",
            )
        # As the model has it: some parts of it may want more bits than the others.
        kept = dtype if dtype is not None and tensor.is_floating_point() else old.dtype
        value: Any = tensor.to(kept, copy=True)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=value.is_floating_point())
        registry[leaf] = value
        return True
    return False


def _shapes_of(model: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes only; the model is left as it is."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
