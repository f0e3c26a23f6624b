"""Modules that stand in where a class of torch cannot say what an erased layer computes.

They have the parameter names of what they replace, so that state dicts keep their names.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["CompactAttention", "CompensatedGroupNorm", "CompensatedLayerNorm", "Erased", "Nothing"]


Nothing = Literal["zeros", "input", "scalar", "empty"]


class CompensatedLayerNorm(nn.Module):
    """Layer norm over some of the channels, as if the others were there and zero.

    With C of ``total`` channels left and s = C / total, mean = s mean' and
    var = s var' + s (1 - s) mean'^2, where primes mark the moments over what is left.

    Args:
        weight: Scale of the channels that are left, shape (C,); None for none.
        bias: Shift, shape (C,); None for none.
        total: Number of channels that the moments count.
        eps: Added to the variance.
        axis: The axis of the input that holds the channels.

    Shapes:
        input and output: any, with C channels along ``axis``.

    Source: own; also arXiv 2606.14346 ("CompensatedLayerNorm").
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        total: int,
        eps: float,
        axis: int = -1,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.total = total
        self.eps = eps
        self.axis = axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; half-precision inputs are normalised in float32, as ``layer_norm`` does."""
        x = input.movedim(self.axis, -1)
        low = x.dtype in (torch.float16, torch.bfloat16)
        wide = x.float() if low else x
        share = x.shape[-1] / self.total
        var, mean = torch.var_mean(wide, -1, correction=0, keepdim=True)
        var = share * var + share * (1 - share) * mean.square()
        result = (wide - share * mean) * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            result = result * self.weight
        if self.bias is not None:
            result = result + self.bias
        return result.to(x.dtype).movedim(-1, self.axis)

    def extra_repr(self) -> str:
        """How many channels are counted, and of which axis."""
        return f"total={self.total}, eps={self.eps}, axis={self.axis}"


class CompensatedGroupNorm(nn.Module):
    """Group norm over some of the channels, as if the others were there and zero.

    Of a group of I channels, each at P positions, the C that are left give
    mean = sum(x) / (I P) and var = (sum((x - mean)^2) + (I - C) P mean^2) / (I P).

    Args:
        weight: Scale of the channels that are left, shape (C,); None for none.
        bias: Shift, shape (C,); None for none.
        group: Which group each channel is in, shape (C,) int64.
        inner: Channels that each group counts (I).
        eps: Added to the variance.

    Shapes:
        input and output: (batch, C, *positions).

    Source: own.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    group: torch.Tensor
    missing: torch.Tensor

    def __init__(
        self,
        weight: nn.Parameter | None,
        bias: nn.Parameter | None,
        *,
        group: torch.Tensor,
        inner: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.num_groups = int(group.max()) + 1
        self.inner = inner
        self.eps = eps
        self.register_buffer("group", group, persistent=False)
        missing = inner - torch.bincount(group, minlength=self.num_groups)
        self.register_buffer("missing", missing, persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; half-precision inputs are normalised in float32, as ``group_norm`` does."""
        low = input.dtype in (torch.float16, torch.bfloat16)
        x = input.float() if low else input
        x = x.flatten(2) if x.dim() > 2 else x[..., None]
        count, positions = self.inner * x.shape[-1], x.shape[-1]
        mean = self._total(x) / count
        centred = x - mean[:, self.group, None]
        squares = self._total(centred.square()) + self.missing * positions * mean.square()
        result = centred * torch.rsqrt(squares / count + self.eps)[:, self.group, None]
        if self.weight is not None:
            result = result * self.weight[:, None]
        if self.bias is not None:
            result = result + self.bias[:, None]
        return result.reshape(input.shape).to(input.dtype)

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the channels and positions of each group, (batch, groups)."""
        zeros = x.new_zeros(x.shape[0], self.num_groups)
        return zeros.index_add(1, self.group, x.sum(-1))

    def extra_repr(self) -> str:
        """How many channels are counted."""
        return f"num_groups={self.num_groups}, inner={self.inner}, eps={self.eps}"


class CompactAttention(nn.Module):
    """``nn.MultiheadAttention`` whose heads need not fill the embedding.

    torch's own class derives the head dimension from the embedding and the number of heads, so
    it cannot lose a head alone. Parameters have its names, and the call has its arguments.

    Args:
        source: The attention that it replaces; its parameters are taken over, already small.
        num_heads: Heads that are left.
        head_dim: Dimensions of each.
        scale: Factor of the scores.
    """

    # nn.TransformerEncoderLayer asks for these before it takes its fused path, which cannot run
    # this module; the answer keeps it off.
    _qkv_same_embed_dim = False

    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    out_proj: nn.Linear

    def __init__(
        self, source: nn.MultiheadAttention, *, num_heads: int, head_dim: int, scale: float
    ) -> None:
        super().__init__()
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, source._parameters.get(name))
        self.register_parameter("in_proj_bias", source._parameters.get("in_proj_bias"))
        self.out_proj = source.out_proj
        self.embed_dim = self.out_proj.weight.shape[0]
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = float(source.dropout)
        self.batch_first = bool(source.batch_first)
        self.training = source.training

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``nn.MultiheadAttention.forward``."""
        single = query.dim() == 2
        q, k, v = self._project(query, key, value, single)
        mask = self._mask(q, k, key_padding_mask, attn_mask, single)
        if mask is None and is_causal:
            raise RuntimeError("is_causal needs attn_mask as well, as in nn.MultiheadAttention")
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = F.dropout(weights, self.dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            rate = self.dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=rate, scale=self.scale
            )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if single:
            return out[0], None if weights is None else weights[0]
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, single: bool
    ) -> list[torch.Tensor]:
        """Queries, keys and values, each (batch, heads, positions, head_dim)."""
        matrices: tuple[Any, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        biases: tuple[Any, ...] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)
        found = []
        for x, weight, bias in zip((query, key, value), matrices, biases, strict=True):
            y = F.linear(x, weight, bias)
            y = y[None] if single else y if self.batch_first else y.transpose(0, 1)
            found.append(y.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2))
        return found

    def _mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        padding: torch.Tensor | None,
        mask: torch.Tensor | None,
        single: bool,
    ) -> torch.Tensor | None:
        """Both masks as one that is added to the scores."""
        padding = _additive(padding, q.dtype)
        mask = _additive(mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is None:
            return mask
        padding = padding[None, None, None] if single else padding[:, None, None]
        return padding if mask is None else mask + padding

    def extra_repr(self) -> str:
        """Sizes of what is left."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, scale={self.scale:.6g}"


class Erased(nn.Module):
    """Stands where a branch was erased as a whole, and adds nothing.

    Args:
        gives: ``"zeros"`` of the shape of the input, as a residual branch has; the ``"input"``,
            where the residual connection was inside; a ``"scalar"`` zero, which broadcasts; or
            the ``"empty"`` tensor that ``torch.cat`` leaves out.
        layer: Place of erased attention in a cache of transformers, whose first layer counts the
            positions for all; None for none.
        outputs: How many values what it replaces returned, as attention does with its weights:
            the first is this nothing, the others None. None: one that is no tuple.
    """

    def __init__(
        self, *, gives: Nothing = "zeros", outputs: int | None = None, layer: int | None = None
    ) -> None:
        super().__init__()
        self.layer_idx = layer
        self.gives: Nothing = gives
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, on the device and in the dtype of the first tensor given."""
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
        like = given[0] if given else torch.zeros(())
        cache = kwargs.get("past_key_values")
        if cache is not None and self.layer_idx is not None:
            empty = like.new_zeros(like.shape[0], 1, like.shape[1], 1)
            cache.update(empty, empty, self.layer_idx)
        if self.gives == "input":
            nothing = like
        elif self.gives == "zeros":
            nothing = torch.zeros_like(like)
        else:
            nothing = like.new_zeros(() if self.gives == "scalar" else (0,))
        return nothing if self.outputs is None else (nothing, *(None,) * (self.outputs - 1))

    def extra_repr(self) -> str:
        """Which kind of nothing."""
        return f"gives={self.gives!r}, outputs={self.outputs}"


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask, true where nothing may be read, as a mask that is added."""
    if mask is None or mask.dtype is not torch.bool:
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
