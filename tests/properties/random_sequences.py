"""Attention and other ops of random networks over sequences ``[b, n, c]``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.properties.random_parts import Function, Make

__all__ = ["SEQUENCES", "Attention", "FusedAttention", "GroupedQueries"]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv: int, size: int) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, size
        self.q = nn.Linear(width, heads * size)
        self.k = nn.Linear(width, kv * size)
        self.v = nn.Linear(width, kv * size)
        self.o = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.size).transpose(1, 2)
        k = self.k(x).view(b, n, self.kv, self.size).transpose(1, 2)
        v = self.v(x).view(b, n, self.kv, self.size).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv, 1)
        v = v.repeat_interleave(self.heads // self.kv, 1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, self.heads * self.size))


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int, size: int, layout: str) -> None:
        super().__init__()
        self.heads, self.size, self.layout = heads, size, layout
        self.qkv = nn.Linear(width, 3 * heads * size)
        self.o = nn.Linear(heads * size, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h, d = self.heads, self.size
        fused = self.qkv(x)
        if self.layout == "unbind":
            q, k, v = fused.view(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "chunk":
            q, k, v = (t.view(b, n, h, d).transpose(1, 2) for t in fused.chunk(3, -1))
        else:
            q, k, v = fused.view(b, n, h, 3 * d).transpose(1, 2).split(d, -1)
        y = torch.softmax(q @ k.transpose(-1, -2) * d**-0.5, -1) @ v
        return self.o(y.transpose(1, 2).reshape(b, n, h * d))


class GroupedQueries(nn.Module):
    """Attention with grouped queries in many ways of writing it."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.heads, self.kv, self.size = ((4, 2, 2), (2, 1, 4), (2, 2, 4))[make.seed % 3]
        self.norm = ("none", "layer", "rms", "cosine")[make.seed // 3 % 4]
        self.how = ("fused", "fused_gqa", "written", "grouped")[make.seed // 12 % 4]
        self.talking, self.rotary = make.seed // 48 % 2 == 1, make.seed // 96 % 2 == 1
        bias = make.seed // 192 % 2 == 0
        self.q = nn.Linear(make.width, self.heads * self.size, bias=bias)
        self.k = nn.Linear(make.width, self.kv * self.size, bias=bias)
        self.v = nn.Linear(make.width, self.kv * self.size, bias=bias)
        self.o = nn.Linear(self.heads * self.size, make.width)
        norm: Any = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}.get(self.norm, nn.Identity)
        options = {"eps": 1e-3} if norm is not nn.Identity else {}
        self.qn, self.kn = (norm(self.size, **options) for _ in range(2))
        self.logit = nn.Parameter(torch.rand(self.heads, 1, 1))
        self.mix = nn.Linear(self.heads, self.heads, bias=False)
        self.angle: Tensor
        self.register_buffer("angle", torch.rand(self.size))

    def _turn(self, x: Tensor) -> Tensor:
        half = self.size // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.angle.cos() + turned * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h, g, d = self.heads, self.kv, self.size
        q = self.q(x).view(b, n, h, d).transpose(1, 2)
        k = self.k(x).view(b, n, g, d).transpose(1, 2)
        v = self.v(x).view(b, n, g, d).transpose(1, 2)
        if self.norm in ("layer", "rms"):
            q, k = self.qn(q), self.kn(k)
        elif self.norm == "cosine":
            q, k = F.normalize(q, dim=-1) * self.logit.exp(), F.normalize(k, dim=-1)
        if self.rotary:
            q, k = self._turn(q), self._turn(k)
        if self.how == "fused_gqa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif self.how == "grouped":
            q = q.reshape(b, g, h // g, n, d)
            scores = torch.einsum("bgrnd,bgmd->bgrnm", q, k) / d**0.5
            y = torch.einsum("bgrnm,bgmd->bgrnd", scores.softmax(-1), v).reshape(b, h, n, d)
        else:
            k, v = (t[:, :, None].expand(b, g, h // g, n, d).reshape(b, h, n, d) for t in (k, v))
            y = self._attend(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, h * d))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.talking:
            scores = self.mix(scores.movedim(1, -1)).movedim(-1, 1)
        return scores.softmax(-1) @ v


def _latents(make: Make) -> nn.Module:
    """Learned tokens that attend, and are attended to."""
    count = 3

    def run(m: Any, x: Tensor) -> Tensor:
        keys, values = m.k(x), m.v(x)
        latent = F.scaled_dot_product_attention(
            m.latent.expand(x.shape[0], count, make.width), keys, values
        )
        return F.scaled_dot_product_attention(m.q(x), latent, latent)

    parts = {n: nn.Linear(make.width, make.width) for n in "qkv"}
    return Function(run, latent=nn.Parameter(torch.randn(count, make.width)), **parts)


def _channel_attention(make: Make) -> nn.Module:
    """Cross-covariance attention: channels attend to channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (p(x).view(b, n, 2, c // 2).permute(0, 2, 3, 1) for p in (m.q, m.k, m.v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = (q @ k.transpose(-1, -2) * m.heat).softmax(-1) @ v
        return y.permute(0, 3, 1, 2).reshape(b, n, c)

    parts = {n: nn.Linear(make.width, make.width) for n in "qkv"}
    return Function(run, heat=nn.Parameter(torch.rand(2, 1, 1)), **parts)


def _token_convolution(make: Make) -> nn.Module:
    groups = make.width if make.seed % 2 else 1
    return Function(
        lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2),
        conv=nn.Conv1d(make.width, make.width, 3, padding=1, groups=groups),
    )


def _token_pool(make: Make) -> nn.Module:
    """Every token gets the weighted mean of all."""
    return Function(
        lambda m, x: x + (m.score(x).softmax(1) * x).sum(1, keepdim=True),
        score=nn.Linear(make.width, 1),
    )


def _linear_attention(make: Make) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1
        top = q @ (k.transpose(1, 2) @ m.v(x))
        return top / (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)

    parts = {n: nn.Linear(make.width, make.width) for n in "qkv"}
    return Function(run, **parts)


def _gram(make: Make) -> nn.Module:
    return Function(lambda m, x: x @ (x.transpose(1, 2) @ x).tanh())


SEQUENCES = {
    "grouped_queries": GroupedQueries,
    "latents": _latents,
    "channel_attention": _channel_attention,
    "token_convolution": _token_convolution,
    "token_pool": _token_pool,
    "linear_attention": _linear_attention,
    "gram": _gram,
    "cumsum_tokens": lambda make: Function(lambda m, x: x.cumsum(1)),
    "max_tokens": lambda make: Function(lambda m, x: x - x.amax(1, keepdim=True)),
    "var_tokens": lambda make: Function(lambda m, x: x / (x.var(1, keepdim=True) + 1)),
    "softmax_tokens": lambda make: Function(lambda m, x: x.softmax(1) * x),
}
