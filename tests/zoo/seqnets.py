"""Hand-made networks on vectors, sequences and tokens, one structure each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.zoo_model import ZooModel, sequences, token_ids, vectors

__all__ = ["SEQNETS"]


class HandRMSNorm(nn.Module):
    """As Llama writes it, from single ops."""

    def __init__(self, width: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class HandLayerNorm(nn.Module):
    """As TensorFlow ports write it, from single ops."""

    def __init__(self, width: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class ResidualMLP(nn.Module):
    """Pre-norm residual blocks on vectors, with a norm before the head."""

    def __init__(self, norm: type[nn.Module] | object, width: int = 14, hidden: int = 20) -> None:
        super().__init__()
        assert callable(norm)
        self.enter = nn.Linear(9, width)
        self.norms = nn.ModuleList(norm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


class PostNormMLP(nn.Module):
    """LayerNorm on the sum, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(9, 14)
        self.up = nn.Linear(14, 20)
        self.down = nn.Linear(20, 14)
        self.norm = nn.LayerNorm(14)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.enter(x))
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))))


class SwiGLU(nn.Module):
    """Separate gate and up projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(12, eps=1e-5)
        self.gate = nn.Linear(12, 18, bias=False)
        self.up = nn.Linear(12, 18, bias=False)
        self.down = nn.Linear(18, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class ChunkGating(nn.Module):
    """One projection for gate and value: chunk, split and F.glu in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 2 * 12)
        self.two = nn.Linear(12, 14 + 14)
        self.three = nn.Linear(14, 2 * 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.one(x).chunk(2, -1)
        x = F.silu(gate) * value
        value, gate = self.two(x).split([14, 14], -1)
        x = value * F.gelu(gate)
        return self.out(F.glu(self.three(x), -1))


class SplitUneven(nn.Module):
    """One projection cut into three unequal pieces with different fates."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 6 + 8 + 3)
        self.a = nn.Linear(6, 8)
        self.out = nn.Linear(8 + 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.one(x).split([6, 8, 3], -1)
        return self.out(torch.cat([self.a(F.relu(first)) * second, F.relu(third)], -1))


class FusedQKV(nn.Module):
    """timm's attention: one projection, viewed as three by heads by width, and unbound."""

    def __init__(self, width: int = 24, heads: int = 4, *, out_norm: bool = True) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.enter = nn.Linear(10, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.last = nn.LayerNorm(width) if out_norm else nn.Identity()
        self.head = nn.Linear(width, 5)

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.attend(self.norm(x))
        return self.head(self.last(x).mean(1))


class FusedQKVChunk(FusedQKV):
    """nanoGPT's attention: one projection, split into three, each viewed by heads; causal."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).split(c, dim=2)
        q, k, v = (t.view(b, n, self.heads, c // self.heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(b, n, c))


class FusedQKVInterleaved(FusedQKV):
    """GPT-NeoX's attention: heads outside, query, key and value inside."""

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, self.heads, 3 * self.size).transpose(1, 2)
        q, k, v = qkv.chunk(3, -1)
        y = torch.softmax(q @ k.transpose(-1, -2) / self.size**0.5, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class FusedQKVIndex(FusedQKV):
    """Swin's attention: the first axis is indexed, and a bias table is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(self.heads, 1, 1))

    def attend(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        scores = (q * self.size**-0.5) @ k.transpose(-2, -1) + self.table
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(y)


class EinsumAttention(nn.Module):
    def __init__(self, width: int = 20, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(width, heads, size) * 0.2)
        self.wk = nn.Parameter(torch.randn(width, heads, size) * 0.2)
        self.wv = nn.Parameter(torch.randn(width, heads, size) * 0.2)
        self.wo = nn.Parameter(torch.randn(heads, size, width) * 0.2)
        self.enter = nn.Linear(10, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        q = torch.einsum("bnc,chd->bhnd", x, self.wq)
        k = torch.einsum("bnc,chd->bhnd", x, self.wk)
        v = torch.einsum("bnc,chd->bhnd", x, self.wv)
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) * 0.4
        y = torch.einsum("bhnm,bhmd->bhnd", scores.softmax(-1), v)
        return self.head(x + torch.einsum("bhnd,hdc->bnc", y, self.wo))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos + turned * sin


class GroupedQueryRotary(nn.Module):
    """Llama's attention: six query heads share two key and value heads; rotary positions."""

    frequency: Tensor

    def __init__(self, *, native: bool = False, interleaved: bool = False) -> None:
        super().__init__()
        self.native, self.interleaved = native, interleaved
        self.heads, self.kv, self.size = 6, 2, 8
        self.embed = nn.Embedding(31, 20)
        self.norm = HandRMSNorm(20)
        self.q = nn.Linear(20, 48, bias=False)
        self.k = nn.Linear(20, 16, bias=False)
        self.v = nn.Linear(20, 16, bias=False)
        self.o = nn.Linear(48, 20, bias=False)
        self.last = HandRMSNorm(20)
        self.head = nn.Linear(20, 31, bias=False)
        self.register_buffer("frequency", 0.3 ** (torch.arange(4) / 4.0), persistent=False)

    def positions(self, length: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(length)[:, None] * self.frequency[None]
        return angle.cos(), angle.sin()

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.interleaved:
            return rotate(x, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        cos, sin = self.positions(n)
        q = self.turn(self.q(x).view(b, n, self.heads, self.size).transpose(1, 2), cos, sin)
        k = self.turn(self.k(x).view(b, n, self.kv, self.size).transpose(1, 2), cos, sin)
        v = self.v(x).view(b, n, self.kv, self.size).transpose(1, 2)
        if not self.native:
            repeat = self.heads // self.kv
            k = k[:, :, None].expand(b, self.kv, repeat, n, self.size).reshape(b, -1, n, self.size)
            v = v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.native)
        return self.o(y.transpose(1, 2).reshape(b, n, -1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attend(self.norm(x))
        return self.head(self.last(x))


class Conv1DLinear(nn.Module):
    """GPT-2's Conv1D: weights stored as input by output, called through addmm."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cin, cout) * 0.2)
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        out = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(out)


class Conv1DBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = Conv1DLinear(10, 16)
        self.norm = nn.LayerNorm(16)
        self.up = Conv1DLinear(16, 22)
        self.down = Conv1DLinear(22, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)), approximate="tanh")))


class TiedEmbeddings(nn.Module):
    """Input and output embeddings are one parameter; positions are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 16)
        self.position = nn.Embedding(32, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))))


class MultiHead(nn.Module):
    """nn.MultiheadAttention, batch first, without the fast path's nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x + y)


class EncoderLayer(nn.Module):
    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(10, 24)
        self.layer = nn.TransformerEncoderLayer(
            24, 4, dim_feedforward=32, batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.enter(x)))


class CrossAttention(nn.Module):
    """Keys and values come from another stream of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Linear(10, 18)
        self.memory = nn.Linear(10, 14)
        self.q = nn.Linear(18, 24)
        self.kv = nn.Linear(14, 2 * 24)
        self.out = nn.Linear(24, 18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        stream, memory = self.stream(x), F.relu(self.memory(x))
        q = self.q(stream).view(b, n, 3, 8).transpose(1, 2)
        k, v = self.kv(memory).view(b, n, 2, 3, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(stream + self.out(y))


class TwoOutputs(nn.Module):
    """A dict with a head each for two tasks, one of which reads the other's features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(9, 16)
        self.a = nn.Linear(16, 12)
        self.b = nn.Linear(16 + 12, 3)
        self.c = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.trunk(x))
        y = F.relu(self.a(x))
        return {"b": self.b(torch.cat([x, y], 1)), "c": self.c(y)}


class DotProduct(nn.Module):
    """Two towers that meet in a dot product, whose axis may shrink on both sides alike."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 12))
        self.right = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) @ self.right(x).T


class StackedViews(nn.Module):
    """Stack, squeeze, unsqueeze, flip, roll, pad and narrow on axes beside the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(10, 12)
        self.two = nn.Linear(10, 12)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([F.relu(self.one(x)), F.silu(self.two(x))], 1)
        both = torch.roll(both.flip(1), 1, 2) + both.sum(1, keepdim=True)
        both = F.pad(both, (0, 0, 1, 1)).narrow(2, 1, x.shape[1])
        return self.out(both.unsqueeze(-1).squeeze(-1).max(1).values)


def _vector(name: str, make: object, **options: object) -> ZooModel:
    assert callable(make)
    return ZooModel(name, make, **{**vectors(9), **options})


def _sequence(name: str, make: object, width: int = 10, **options: object) -> ZooModel:
    assert callable(make)
    return ZooModel(name, make, **{**sequences(width), **options})


def _tokens(name: str, make: object, vocabulary: int, **options: object) -> ZooModel:
    assert callable(make)
    return ZooModel(name, make, **{**token_ids(vocabulary), **options})


_MLP = ("enter.weight[0]", "up.0.weight[0]", "head.weight[1]")
_ATTENTION = ("qkv.weight[0]", "enter.weight[0]", "proj.weight[1]")
_GQA = ("q.weight[0]", "v.weight[0]", "o.weight[1]", "embed.weight[1]")

SEQNETS: tuple[ZooModel, ...] = (
    _vector("layer_norm_mlp", lambda: ResidualMLP(nn.LayerNorm), free=_MLP),
    _vector("rms_norm_mlp", lambda: ResidualMLP(lambda n: nn.RMSNorm(n, eps=1e-3)), free=_MLP),
    _vector("rms_norm_no_eps", lambda: ResidualMLP(nn.RMSNorm), free=_MLP),
    _vector("hand_rms_norm_mlp", lambda: ResidualMLP(HandRMSNorm), free=_MLP),
    _vector(
        "hand_layer_norm_mlp",
        lambda: ResidualMLP(HandLayerNorm),
        free=_MLP,
        approximate=("enter.weight:0",),
    ),
    _vector("post_norm_mlp", PostNormMLP, free=("enter.weight[0]", "up.weight[0]")),
    _vector("two_outputs", TwoOutputs, free=("trunk.weight[0]", "a.weight[0]")),
    _vector("dot_product", DotProduct, free=("left.0.weight[0]", "left.2.weight[0]")),
    _sequence("swiglu", SwiGLU, 12, free=("gate.weight[0]",), pinned=("norm.weight[0]",)),
    _sequence("chunk_gating", ChunkGating, free=("one.weight[0]", "three.weight[0]")),
    _sequence("split_uneven", SplitUneven, free=("one.weight[0]", "a.weight[0]")),
    _sequence("fused_qkv_unbind", FusedQKV, free=_ATTENTION),
    _sequence("fused_qkv_chunk", FusedQKVChunk, free=_ATTENTION),
    _sequence("fused_qkv_interleaved", FusedQKVInterleaved, free=_ATTENTION),
    _sequence("fused_qkv_index", FusedQKVIndex, free=_ATTENTION),
    _sequence("fused_qkv_no_norm", lambda: FusedQKV(out_norm=False), free=_ATTENTION),
    _sequence("einsum_attention", EinsumAttention, free=("wq[1]", "wv[2]", "enter.weight[0]")),
    _tokens("gqa_rotary", GroupedQueryRotary, 31, free=_GQA, approximate=("q.weight:0/1",)),
    _tokens(
        "gqa_native",
        lambda: GroupedQueryRotary(native=True),
        31,
        free=_GQA,
        approximate=("q.weight:0/1",),
    ),
    _tokens(
        "rotary_interleaved",
        lambda: GroupedQueryRotary(interleaved=True),
        31,
        free=_GQA,
        approximate=("q.weight:0/1",),
    ),
    _sequence("conv1d_linear", Conv1DBlock, free=("up.weight[1]", "enter.weight[1]")),
    _tokens("tied_embeddings", TiedEmbeddings, 37, free=("embed.weight[1]", "up.weight[0]")),
    _sequence("multihead", MultiHead, free=("attention.in_proj_weight[0]",)),
    _sequence("encoder_post", lambda: EncoderLayer(norm_first=False), free=("enter.weight[0]",)),
    _sequence("encoder_pre", lambda: EncoderLayer(norm_first=True), free=("enter.weight[0]",)),
    _sequence("cross_attention", CrossAttention, free=("kv.weight[0]", "memory.weight[0]")),
    _sequence("stacked_views", StackedViews, free=("one.weight[0]",)),
)
