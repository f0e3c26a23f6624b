"""How the models of transformers are built: from tiny configurations that many of them share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from torch import nn

from torchlathe.tools.bench.coverage.entry import VOCABULARY, Entry, Inputs

__all__ = ["BART", "BERT", "NARROW", "tiny"]

NARROW: Final[dict[str, Any]] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
}
BERT: Final[dict[str, Any]] = {
    **NARROW,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
BART: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def tiny(
    name: str,
    model: str,
    config: str,
    inputs: Callable[[int], Inputs],
    note: str = "",
    **options: Any,
) -> Entry:
    """A model from the names of its class and of its config's class, without ``Config``."""

    def make() -> nn.Module:
        package = import_module("transformers")
        settings = getattr(package, config + "Config")(**_nested(options))
        built = getattr(package, model)(settings)
        assert isinstance(built, nn.Module)
        return built

    return Entry(f"transformers/{name}", make, inputs, note=note)


def _nested(options: dict[str, Any]) -> dict[str, Any]:
    """Options with configs made where a value is ``(class name, its options)``."""

    def convert(value: Any) -> Any:
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
            return getattr(import_module("transformers"), value[0])(**value[1])
        return value

    return {name: convert(value) for name, value in options.items()}
