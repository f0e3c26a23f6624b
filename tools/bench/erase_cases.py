"""The models that `bench_erase` measures, and how the peer is told about each.

Random weights at the sizes that people use. What a user of Torch-Pruning must say by hand (heads,
layers to leave alone, attributes to patch afterwards) is here too, as its README has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

import torch
from torch import nn
from torch.export import Dim

__all__ = ["CASES", "COVERAGE", "Case"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _nothing(model: nn.Module) -> dict[str, Any]:
    return {}


def _unpatched(model: nn.Module, options: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: As the table shows it.
        build: Makes the module.
        inputs: Makes example inputs ``(args, kwargs)``.
        dynamic_shapes: As ``torch.export`` takes them.
        peer_options: What Torch-Pruning must be told: options of its pruner.
        peer_patch: What must be patched by hand after Torch-Pruning; gets those options.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    dynamic_shapes: Any
    peer_options: Callable[[nn.Module], dict[str, Any]] = _nothing
    peer_patch: Callable[[nn.Module, Mapping[str, Any]], None] = _unpatched


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        built = getattr(import_module("torchvision.models"), name)(weights=None, **options)
        assert isinstance(built, nn.Module)
        return built

    return build


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        package = import_module("transformers")
        built = getattr(package, model)(getattr(package, config)(**options))
        assert isinstance(built, nn.Module)
        return built

    return build


def _image(edge: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(2, 3, edge, edge),), {})


def _pixels(edge: int) -> Callable[[], Inputs]:
    return lambda: ((), {"pixel_values": torch.randn(2, 3, edge, edge)})


def _tokens(vocabulary: int, length: int) -> Callable[[], Inputs]:
    def make() -> Inputs:
        ids = torch.randint(3, vocabulary, (2, length))
        return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


_BATCH = ({0: Dim.DYNAMIC},)
_PIXELS = {"pixel_values": {0: Dim.DYNAMIC}}
_TEXT = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in ("input_ids", "attention_mask")}


def _resnet_options(model: nn.Module) -> dict[str, Any]:
    return {"ignored_layers": [model.get_submodule("fc")]}


def _vit_options(model: nn.Module) -> dict[str, Any]:
    return {"ignored_layers": [model.get_submodule("heads")]}


def _vit_patch(model: nn.Module, options: Mapping[str, Any]) -> None:
    model.hidden_dim = model.get_submodule("conv_proj").out_channels


def _attentions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "BertSelfAttention"]


def _bert_options(model: nn.Module) -> dict[str, Any]:
    heads = {
        layer: attention.num_attention_heads
        for attention in _attentions(model)
        for layer in (attention.query, attention.key, attention.value)
    }
    return {
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.5,
        "output_transform": lambda out: out.pooler_output.sum(),
        "ignored_layers": [model.get_submodule("pooler")],
    }


def _bert_patch(model: nn.Module, options: Mapping[str, Any]) -> None:
    for attention in _attentions(model):
        heads = options["num_heads"][attention.query]
        attention.num_attention_heads = heads
        attention.attention_head_size = attention.query.out_features // heads
        attention.all_head_size = attention.query.out_features


CASES: Final = {
    case.name: case
    for case in (
        Case("resnet50", _torchvision("resnet50"), _image(224), _BATCH, _resnet_options),
        Case("vit_b_16", _torchvision("vit_b_16"), _image(224), _BATCH, _vit_options, _vit_patch),
        Case(
            "bert_base",
            _transformers("BertModel", "BertConfig"),
            _tokens(30000, 64),
            _TEXT,
            _bert_options,
            _bert_patch,
        ),
    )
}

_TINY: Final = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}

# Small models that are run by both, with no hints, to see which of the two copes.
COVERAGE: Final = (
    Case(
        "gpt2",
        _transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=97,
            n_embd=48,
            n_layer=1,
            n_head=4,
            use_cache=False,
        ),
        _tokens(97, 9),
        _TEXT,
    ),
    Case(
        "llama_gqa",
        _transformers(
            "LlamaForCausalLM", "LlamaConfig", **_TINY, num_key_value_heads=2, use_cache=False
        ),
        _tokens(97, 9),
        _TEXT,
    ),
    Case(
        "qwen3",
        _transformers(
            "Qwen3ForCausalLM",
            "Qwen3Config",
            **_TINY,
            num_key_value_heads=2,
            head_dim=12,
            use_cache=False,
        ),
        _tokens(97, 9),
        _TEXT,
    ),
    Case(
        "swin",
        _transformers(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        _pixels(32),
        _PIXELS,
    ),
    Case(
        "convnext",
        _transformers(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[12, 16, 20, 24],
            depths=[1, 1, 1, 1],
        ),
        _pixels(32),
        _PIXELS,
    ),
    Case("shufflenet", _torchvision("shufflenet_v2_x0_5"), _image(32), _BATCH),
    Case("densenet121", _torchvision("densenet121"), _image(32), _BATCH),
    Case("mobilenet_v2", _torchvision("mobilenet_v2"), _image(32), _BATCH),
)
