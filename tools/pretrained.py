"""Models of transformers: from a folder with weights, or from a config with random ones."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from torchlathe.ir import InputError, UnsupportedError
from torchlathe.tools.compat import define_torchvision_ops
from torchlathe.tools.input_specs import InputSpec, random_inputs
from torchlathe.tools.models import NamedModel

__all__ = ["load_pretrained"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_BATCH, _SEQUENCE = 2, 16


def load_pretrained(name: str, *, meta: bool = False) -> NamedModel:
    """A transformers model with example inputs that fit its config.

    The class is the first of the config's ``architectures`` where it has any, else that of
    ``AutoModel``. Decoders do not return their key-value cache. Nothing is downloaded, and no code
    from the folder is run.

    Args:
        name: A folder with ``config.json`` (and weights, or random ones are made), or the path of
            a config, with random weights.
        meta: Make the model on the meta device, in the dtype of the config, with shapes and
            without values. So it is in any case if there are no weights and random ones would
            take more than half of the machine's memory.

    Raises:
        InputError: No config there, or one that transformers does not know.
        UnsupportedError: transformers is not installed, or the kind of inputs is not known.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        what = f"the folder {path} has no config.json" if path.is_dir() else f"there is no {path}"
        raise InputError(what, hint="name a folder that transformers' save_pretrained wrote")
    transformers = _transformers()
    config = _config(transformers, file)
    folder = path if path.is_dir() and _has_weights(path) else None
    try:
        model, notes = _make(transformers, config, None if meta else folder, meta)
    except Exception as error:
        raise InputError(
            f"transformers cannot make the model of {name}: {type(error).__name__}: {error}",
            where=str(file),
        ) from error
    inputs = random_inputs(_specs(model, config))
    return NamedModel(
        name, model.eval(), inputs.args, dict(inputs.kwargs), inputs.dynamic_shapes, notes
    )


def _transformers() -> Any:
    define_torchvision_ops()
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError(
            f"a transformers config needs the package transformers: {error}",
            hint="install it with: pip install 'torchlathe[demo]'",
        ) from error
    return transformers


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def _config(transformers: Any, file: Path) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in transformers.CONFIG_MAPPING:
        raise InputError(
            f"{file} has the model type {kind!r}, which transformers "
            f"{transformers.__version__} does not know",
            hint="name a Python function that makes the model instead",
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(data)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and getattr(part, "use_cache", False):
            part.use_cache = False
    return config


def _make(
    transformers: Any, config: Any, folder: Path | None, meta: bool
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    wanted = (config.architectures or [None])[0]
    cls = getattr(transformers, wanted, None) if wanted else None
    if folder is not None and _is_compressed(config):
        from torchlathe.tools.checkpoints import load_checkpoint

        loaded: Any = load_checkpoint(folder, dtype=torch.float32)
        for part in (loaded.config, loaded.config.get_text_config()):
            part.use_cache = False
        return loaded, ()
    if folder is not None:
        maker = cls or transformers.AutoModel
        model = maker.from_pretrained(
            folder, config=config, local_files_only=True, dtype=torch.float32
        )
        return model, ()
    make = cls if cls is not None else transformers.AutoModel.from_config
    small = None if meta else _small_or_none(make, config)
    if small is not None:
        return small, ("the weights are random, for the config comes without any",)
    dtype = getattr(config, "dtype", None) or torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = make(config)
    finally:
        torch.set_default_dtype(before)
    return model, (f"the model was made on the meta device in {str(dtype)[6:]}, without values",)


def _is_compressed(config: Any) -> bool:
    """Whether the weights of a config are stored in few bits, in the format that is read here."""
    quantization: Any = getattr(config, "quantization_config", None)
    found = isinstance(quantization, dict) and quantization.get("quant_method")
    return bool(found == "compressed-tensors")


def _small_or_none(make: Any, config: Any) -> Any:
    """A model with random weights; None if they would take more than half of the memory."""
    try:
        with torch.device("meta"):
            probe = make(config)
    except Exception:
        # Some models compute with values while they are made; so their size is not known.
        return make(config)
    need = sum(t.nbytes for t in (*probe.parameters(), *probe.buffers()))
    return None if need > _memory() // 2 else make(config)


def _memory() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize  # not told on this system


def _specs(model: Any, config: Any) -> list[InputSpec]:
    """Inputs that the model takes, with a dynamic batch (and sequence)."""
    main = getattr(model, "main_input_name", "")
    if main == "input_ids":
        return _text_specs(config)
    if main == "pixel_values":
        return [_image_spec(config)]
    raise UnsupportedError(
        f"example inputs of {type(model).__name__} ({main or 'unknown'}) cannot be made from its "
        "config",
        hint='give them: --inputs "name=dtype[shape],..."',
    )


def _text_specs(config: Any) -> list[InputSpec]:
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or 0
    # RoBERTa and its kin keep positions for padding: 514 of them are for 512 tokens.
    limit -= 2 * (limit % 8 == 2)
    shape = (_BATCH, min(_SEQUENCE, limit or _SEQUENCE))
    axes = {0: "batch", 1: "sequence"}
    most = {"sequence": limit} if limit > shape[1] else {}
    specs = [
        InputSpec("input_ids", torch.int64, shape, axes, most, text.vocab_size),
        InputSpec("attention_mask", torch.int64, shape, axes, most),
    ]
    if getattr(config, "is_encoder_decoder", False):
        axes, most = {0: "batch", 1: "target"}, {"target": limit} if most else {}
        specs.append(
            InputSpec("decoder_input_ids", torch.int64, shape, axes, most, text.vocab_size)
        )
    return specs


def _image_spec(config: Any) -> InputSpec:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    return InputSpec("pixel_values", torch.float32, (_BATCH, channels, height, width), {0: "batch"})
