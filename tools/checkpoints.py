"""Checkpoints in the ``compressed-tensors`` format of models that transformers makes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchlathe.backends.checkpoints import read_checkpoint
from torchlathe.backends.checkpoints.files import config_of
from torchlathe.ir import InputError, UnsupportedError
from torchlathe.tools.compat import define_torchvision_ops

__all__ = ["load_checkpoint", "skeleton"]


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    round_inputs: bool = True,
) -> nn.Module:
    """A transformers model whose quantised layers keep the numbers of a checkpoint.

    A capture of it is a program in the logical form, as after ``quantize``: passes go on from
    it, and ``compile`` fuses its layers. The package compressed-tensors is not needed.

    Args:
        folder: What llm-compressor, the ``checkpoint`` backend or another program wrote.
        model: A module with the structure of the checkpoint; it is left as it is. None: the class
            that the config names, of transformers.
        dtype: That layers compute in; None: as the config says.
        round_inputs: Whether layers round their inputs where the config says so.

    Returns:
        The model, in eval mode.

    Raises:
        InputError: No checkpoint there, or one for another model.
        ArtifactError: Files that are damaged, or contradict one another.
        UnsupportedError: Numbers that have no logical form here, or transformers is missing.
    """
    made = skeleton(folder, dtype) if model is None else model
    return read_checkpoint(folder, made, dtype=dtype, round_inputs=round_inputs)


def skeleton(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config: parameters without values, buffers with theirs.

    Args:
        folder: With the ``config.json`` of a model of transformers.
        dtype: Of the parameters; None: that of the config.

    Raises:
        InputError: transformers does not know the config, or its class cannot be made.
        UnsupportedError: transformers is not installed.
    """
    define_torchvision_ops()
    config: Mapping[str, Any] = config_of(folder)
    kind, names = config.get("model_type"), config.get("architectures") or [None]
    try:
        import transformers

        mapping: Any = transformers.CONFIG_MAPPING
        cls = getattr(transformers, str(names[0]), None)
    except ImportError as error:
        raise UnsupportedError(
            f"the model of a checkpoint is made by the package transformers: {error}",
            hint="install it with: pip install 'torchlathe[demo]', or give the module",
        ) from error
    if kind not in mapping or cls is None:
        raise InputError(
            f"transformers {transformers.__version__} has no {names[0]} of the model type {kind!r}",
            hint="give the module: load_checkpoint(folder, model)",
        )
    data = {key: value for key, value in config.items() if key != "quantization_config"}
    made = mapping[kind].from_dict(data)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or getattr(made, "dtype", None) or torch.float32)
        with _parameters_on_meta():
            model: nn.Module = cls(made)
    except Exception as error:
        raise InputError(
            f"transformers cannot make {names[0]}: {type(error).__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "generation_config") and (Path(folder) / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let parameters that modules register have shapes only; buffers are computed as they are."""
    register = nn.Module.register_parameter

    def registered(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = registered  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
