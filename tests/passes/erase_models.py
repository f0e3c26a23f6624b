"""Small models of the kinds that budgets are tested on; captured once per process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import Program

__all__ = ["BIG", "SMALL", "Gates", "program"]


class Gates(nn.Module):
    """Depthwise and grouped convolutions, squeeze and excite, and sigmoids that fold to a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Linear(12, 8), nn.Linear(8, 12)
        self.mix = nn.Conv2d(12, 16, 1, bias=False)
        self.last = nn.Conv2d(16, 10, 1, bias=False)
        self.head = nn.Linear(10, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.bn(self.stem(x))))
        gate = self.excite(torch.sigmoid(self.squeeze(x.mean((2, 3))))).sigmoid()
        x = F.silu(self.mix(x * gate[:, :, None, None]))
        return self.head(torch.sigmoid(self.last(x)).mean((2, 3)))


class Attention(nn.Module):
    """One pre-norm block with a fused projection of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 16)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = self.enter(x)
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 16)
        x = x + self.out(y)
        return self.head(x + self.down(F.gelu(self.up(x))))


_TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
SMALL = ("gates", "attention")
BIG = ("resnet18", "mobilenet_v2", "bert", "llama")


@functools.cache
def program(name: str) -> Program:
    """The captured model of this name, with random weights; not to be changed."""
    torch.manual_seed(0)
    if name in SMALL:
        model: nn.Module = {"gates": Gates, "attention": Attention}[name]()
        x = torch.randn(2, 3, 8, 8) if name == "gates" else torch.randn(2, 5, 6)
        return tl.capture(_shaken(model), (x,), dynamic_shapes="auto")
    if name in ("resnet18", "mobilenet_v2"):
        torchvision = pytest.importorskip("torchvision")
        options = {"width_mult": 0.35} if name == "mobilenet_v2" else {}
        model = getattr(torchvision.models, name)(num_classes=10, **options)
        return tl.capture(_shaken(model), (torch.randn(1, 3, 32, 32),))
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 61, (2, 7))
    if name == "bert":
        model = transformers.BertModel(transformers.BertConfig(**_TEXT))
    else:
        config = transformers.LlamaConfig(**_TEXT, num_key_value_heads=2, use_cache=False)
        model = transformers.LlamaForCausalLM(config)
    return tl.capture(_shaken(model), (ids,), dynamic_shapes="auto")


def _shaken(model: nn.Module) -> nn.Module:
    """No two units alike, and statistics of batch norms that are not those of fresh ones."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()
