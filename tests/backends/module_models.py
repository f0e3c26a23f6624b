"""Models that the module backend rebuilds: hand-made ones, and small ones of three libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe.tools.compat import define_torchvision_ops

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

VOCABULARY = 61


# -- by hand -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Plain ints with names that say little: only trying them tells what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.d, self.width, self.layer_idx = 4, 8, 32, 4
        self.enter = nn.Linear(6, 32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 40), nn.Linear(40, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        x = self.enter(x)
        q, k, v = self.qkv(x).view(b, n, 3, self.h, self.d).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-1, -2)) * 0.3).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, n, self.h * self.d))
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.view(b, n, self.width).mean(1))


class DefaultScale(nn.Module):
    """Calls the fused attention without a scale, which it takes from the head dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 4, nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.heads, -1)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.out(y.transpose(1, 2).flatten(2))


class Closure(nn.Module):
    """A size in a closure, where nothing can reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)
        inner = 4
        self.turn = lambda x: x.view(x.shape[0], inner, 4).transpose(1, 2).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.turn(torch.relu(self.up(x))))


class Folded(nn.Module):
    """A constant that moves into a bias which is not there, and a tensor as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16, bias=False), nn.Linear(16, 3, bias=False)
        self.table = torch.linspace(0.1, 1, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sigmoid(self.up(x) * self.table))


class Layers(nn.Module):
    """Layers of torch in a row, most of which have sizes as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.GroupNorm(4, 8),
            nn.ConvTranspose2d(8, 12, 2, stride=2),
            nn.InstanceNorm2d(12, affine=True),
            nn.Conv2d(12, 12, 3, padding=1, groups=3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 64, 10),
            nn.RMSNorm(10, eps=1e-3),
            nn.Linear(10, 14),
            nn.LayerNorm(14),
            nn.Linear(14, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


@dataclass
class Options:
    """A record of options that two layers share, as many research codes have it."""

    heads: int = 4


class Shared(nn.Module):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.options.heads, 4).transpose(1, 2)
        y = (q @ q.transpose(-1, -2)).softmax(-1) @ q
        return x + self.o(y.transpose(1, 2).reshape(b, n, -1))


def shared_layers() -> nn.Module:
    options = Options()
    return nn.Sequential(Shared(options), Shared(options))


# -- of libraries --------------------------------------------------------------------------------


def library(module: str) -> Any:
    """A module of a library that not every machine has."""
    define_torchvision_ops()
    pytest.importorskip(module.partition(".")[0])
    return importlib.import_module(module)


def _made(path: str, *args: Any, **options: Any) -> nn.Module:
    module, _, name = path.rpartition(".")
    model = getattr(library(module), name)(*args, **options)
    assert isinstance(model, nn.Module)
    return model


def images(size: int = 32) -> tuple[torch.Tensor]:
    return (torch.randn(2, 3, size, size),)


def resnet() -> Call:
    module = library("torchvision.models.resnet")
    return module.ResNet(module.BasicBlock, [1, 1, 1, 1], num_classes=7), images(), {}


def convnext() -> Call:
    module = library("torchvision.models.convnext")
    stages = [module.CNBlockConfig(16, 32, 1), module.CNBlockConfig(32, None, 1)]
    return module.ConvNeXt(stages), images(), {}


def of_library(path: str, size: int, *args: Any, **options: Any) -> Callable[[], Call]:
    return lambda: (_made(path, *args, **options), images(size), {})


def of_timm(name: str, size: int = 32, **options: Any) -> Callable[[], Call]:
    return lambda: (_made("timm.create_model", name, **options), images(size), {})


def of_transformers(
    model: str, inputs: str, config: str = "", **options: Any
) -> Callable[[], Call]:
    def make() -> Call:
        transformers = library("transformers")
        kind = getattr(transformers, model)
        made = getattr(transformers, config) if config else kind.config_class
        ids = torch.randint(3, VOCABULARY - 1, (2, 7))
        given: dict[str, dict[str, Any]] = {
            "text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
            "causal": {"input_ids": ids, "use_cache": False},
            "pair": {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False},
            "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        }
        return kind(made(**options)), (), given[inputs]

    return make


_BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
}
_LLAMA: dict[str, Any] = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_VIT: dict[str, Any] = {**_BERT, "image_size": 32, "patch_size": 8}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY}
_DISTIL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": VOCABULARY,
}
_SWIN: dict[str, Any] = {"embed_dim": 24, "num_heads": (3, 6), "depths": (1, 1), "num_classes": 5}

VISION: dict[str, Callable[[], Call]] = {
    "resnet": resnet,
    "mobilenet_v2": of_library("torchvision.models.mobilenet_v2", 32, width_mult=0.25),
    "densenet": of_library(
        "torchvision.models.DenseNet", 32, growth_rate=8, block_config=(2, 2), num_init_features=8
    ),
    "convnext": convnext,
    "vit": of_library("torchvision.models.VisionTransformer", 32, 32, 8, 2, 4, 32, 64),
    "encoder": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2),
        (torch.randn(2, 5, 32),),
        {},
    ),
    "timm-vit": of_timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4
    ),
    "timm-convnext": of_timm("convnext_atto", 64, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "timm-swin": of_timm("swin_tiny_patch4_window7_224", img_size=32, window_size=4, **_SWIN),
}
LARGER: dict[str, Callable[[], Call]] = {
    "vgg": of_library("torchvision.models.vgg11", 32),
    "mobilenet_v3": of_library("torchvision.models.mobilenet_v3_small", 32),
    "regnet": of_library("torchvision.models.regnet_y_400mf", 64),
    "squeezenet": of_library("torchvision.models.squeezenet1_1", 64),
    "timm-resnet": of_timm("resnet10t"),
    "timm-efficientnet": of_timm("efficientnet_lite0", 64),
}
TEXT: dict[str, Callable[[], Call]] = {
    "bert": of_transformers("BertForSequenceClassification", "text", **_BERT),
    "roberta": of_transformers("RobertaModel", "text", **_BERT),
    "distilbert": of_transformers("DistilBertModel", "text", **_DISTIL),
    "gpt2": of_transformers("GPT2LMHeadModel", "causal", **_GPT2),
    "llama": of_transformers("LlamaForCausalLM", "causal", **_LLAMA),
    "qwen3": of_transformers("Qwen3ForCausalLM", "causal", **_LLAMA),
    "gemma": of_transformers("GemmaForCausalLM", "causal", **_LLAMA),
    "t5": of_transformers("T5ForConditionalGeneration", "pair", **_T5),
    "bart": of_transformers("BartForConditionalGeneration", "pair", **_BART),
    "vit-hf": of_transformers("ViTForImageClassification", "image", **_VIT),
}
