"""Ops of random networks that keep the shape of what they get.

Each is made from the width of its value, and works on images ``[b, c, h, w]``, sequences
``[b, n, c]`` or vectors ``[b, c]`` alike unless its row in `KEEPING` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.properties.random_parts import Function, Make
from tests.properties.random_sequences import SEQUENCES

__all__ = ["KEEPING", "fitting"]


def along(function: Callable[[Tensor, int], Tensor]) -> Callable[[Make], nn.Module]:
    """An op of the value and its channel axis, without parameters."""
    return lambda make: Function(lambda m, x: function(x, make.dim))


def with_scale(function: Callable[[Tensor, int, Tensor, Tensor], Tensor]) -> Any:
    """An op with a scale and a shift per channel."""
    return lambda make: Function(
        lambda m, x: function(x, make.dim, m.scale, m.shift),
        scale=make.per_channel(),
        shift=make.per_channel(),
    )


# -- reductions over channels ----------------------------------------------------------------


def _by_var(x: Tensor, d: int, w: Tensor, b: Tensor) -> Tensor:
    var = x.var(d, keepdim=True, unbiased=False)
    return (x - x.mean(d, keepdim=True)) / torch.sqrt(var + 1e-3) * w + b


def _by_std_mean(x: Tensor, d: int, w: Tensor, b: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, d, keepdim=True)
    return (x - mean) / (std + 1e-3) * w + b


REDUCTIONS = {
    "mean": along(lambda x, d: x - (x * x).mean(d, keepdim=True) * x),
    "std": along(lambda x, d: x / (x.std(d, keepdim=True) + 1)),
    "var": along(lambda x, d: x * x.var(d, keepdim=True, correction=0)),
    "amax": along(lambda x, d: x * x.amax(d, keepdim=True)),
    "amin": along(lambda x, d: x * F.relu(x).amin(d, keepdim=True)),
    "max": along(lambda x, d: x * x.max(d, keepdim=True).values),
    "relu_amax": along(lambda x, d: F.relu(x) * F.relu(x).amax(d, keepdim=True)),
    "logsumexp": along(lambda x, d: x * x.logsumexp(d, keepdim=True)),
    "normalize": along(lambda x, d: F.normalize(x, dim=d)),
    "l1": along(lambda x, d: x / (1 + x.norm(p=1, dim=d, keepdim=True))),
    "linf": along(lambda x, d: x / (1 + x.norm(p=float("inf"), dim=d, keepdim=True))),
    "softmax": along(lambda x, d: x.softmax(d)),
    "softmax_gate": along(lambda x, d: x * x.softmax(d)),
    "log_softmax": along(lambda x, d: x.log_softmax(d)),
    "cumsum": along(lambda x, d: x * x.cumsum(d)),
    "prod": along(lambda x, d: x * x.tanh().prod(d, keepdim=True)),
    "argmax": along(lambda x, d: x + x.argmax(d, keepdim=True)),
    "cosine": along(lambda x, d: x * F.cosine_similarity(x, x.sin(), dim=d).unsqueeze(d)),
    "sum_of_squares": along(lambda x, d: x * x.square().sum(d, keepdim=True).sqrt()),
    "any": along(lambda x, d: x * (x > 0.5).any(d, keepdim=True)),
    "all": along(lambda x, d: x * (x > -3).all(d, keepdim=True)),
    "rms": with_scale(
        lambda x, d, w, b: x * torch.rsqrt(x.pow(2).mean(d, keepdim=True) + 1e-3) * w
    ),
    "by_var": with_scale(_by_var),
    "by_std_mean": with_scale(_by_std_mean),
}

# -- element by element ----------------------------------------------------------------------

POINTWISE = {
    "shift": along(lambda x, d: x + 0.5),
    "exp": along(lambda x, d: torch.exp(x.tanh())),
    "softplus": along(lambda x, d: F.softplus(x)),
    "cos": along(lambda x, d: x.cos()),
    "hardsigmoid": along(lambda x, d: F.hardsigmoid(x)),
    "where": along(lambda x, d: torch.where(x > 0, x, 0.25)),
    "where_zero": along(lambda x, d: torch.where(x >= 0, x, -0.5)),
    "masked_fill": along(lambda x, d: x.masked_fill(x.abs() < 0.1, 0.7)),
    "clamp": along(lambda x, d: x.clamp(0.1, 2)),
    "reciprocal": along(lambda x, d: 1 / (x.abs() + 1)),
    "power": along(lambda x, d: (x.abs() + 0.1) ** 1.5),
    "sign": along(lambda x, d: x * (x == 0)),
    "floor": along(lambda x, d: x + torch.floor(x + 0.5)),
    "roll": along(lambda x, d: x + x.roll(1, d)),
    "flip": along(lambda x, d: x + x.flip(d)),
    "swap": along(lambda x, d: torch.cat(x.chunk(2, d)[::-1], d)),
    "uneven": along(lambda x, d: torch.cat(x.split([1, x.shape[d] - 1], d)[::-1], d)),
    "twice": along(lambda x, d: torch.stack(torch.cat([x, x * 2], d).chunk(2, d)).sum(0)),
    "affine": with_scale(lambda x, d, w, b: x * w + b),
    "maximum": with_scale(lambda x, d, w, b: torch.maximum(x * w, b)),
    "quotient": with_scale(lambda x, d, w, b: x / (w * w + 1) + 0 * b),
    "scaled_gate": with_scale(lambda x, d, w, b: x * torch.sigmoid(x * w) + b),
    "lerp": with_scale(lambda x, d, w, b: torch.lerp(x, b, w)),
    "late_scale": with_scale(lambda x, d, w, b: (x + 1) * w + b),
}

# -- layers ----------------------------------------------------------------------------------


def _layer_scale(make: Make) -> nn.Module:
    return Function(
        lambda m, x: x + m.gamma * m.mix(x),
        gamma=make.per_channel(),
        mix=make.layer(make.width, make.width),
    )


def _positions(make: Make) -> nn.Module:
    shape = (make.width, make.edge, make.edge) if make.kind == "image" else (make.width,)
    return Function(lambda m, x: x + m.table, table=torch.randn(shape))


def _times_buffer(make: Make) -> nn.Module:
    return Function(lambda m, x: x * m.table, table=make.per_channel().detach())


def _sigmoid_gate(make: Make) -> nn.Module:
    return Function(
        lambda m, x: m.value(x) * torch.sigmoid(m.gate(x)),
        value=make.layer(make.width, make.width, bias=make.seed % 2 == 0),
        gate=make.layer(make.width, make.width),
    )


def _experts(make: Make) -> nn.Module:
    """A dense mixture: every expert runs, and a softmax weighs them."""
    count, w, h = 2 + make.seed % 3, make.width, make.hidden

    def run(m: Any, x: Tensor) -> Tensor:
        y = x.movedim(make.dim, -1)
        gates = m.router(y).softmax(-1) if make.seed % 2 else m.router(y).sigmoid()
        up = torch.einsum("...i,eio->...eo", y, m.up).relu()
        out = torch.einsum("...eo,eoi->...ei", up, m.down)
        return (gates.unsqueeze(-1) * out).sum(-2).movedim(-1, make.dim)

    up, down = (nn.Parameter(torch.randn(count, a, b) * a**-0.5) for a, b in ((w, h), (h, w)))
    return Function(run, router=nn.Linear(w, count), up=up, down=down)


def _weight_standard(make: Make) -> nn.Module:
    """The columns of a standardised weight count in its statistics."""

    def run(m: Any, x: Tensor) -> Tensor:
        w = m.weight
        w = (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-3)
        return F.linear(x.movedim(make.dim, -1), w).movedim(-1, make.dim)

    return Function(run, weight=nn.Parameter(torch.randn(make.width, make.width)))


def _weight_norm(make: Make) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        w = m.g * m.v / (m.v.norm(dim=1, keepdim=True) + 1e-3)
        return F.linear(x.movedim(make.dim, -1), w, m.b).movedim(-1, make.dim)

    return Function(
        run,
        g=nn.Parameter(torch.randn(make.width, 1)),
        v=nn.Parameter(torch.randn(make.width, make.width)),
        b=nn.Parameter(torch.randn(make.width)),
    )


def _low_rank(make: Make) -> nn.Module:
    """A weight that is a product, and the identity beside it."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(x.movedim(make.dim, -1), m.b @ m.a).movedim(-1, make.dim) + x

    a, b = torch.randn(make.hidden, make.width), torch.randn(make.width, make.hidden)
    return Function(run, a=nn.Parameter(a * 0.3), b=nn.Parameter(b * 0.3))


def _grn(make: Make) -> nn.Module:
    """Global response norm of ConvNeXt V2 (over positions where there are any)."""
    over = {"image": (2, 3), "sequence": (1,), "vector": ()}[make.kind]

    def run(m: Any, x: Tensor) -> Tensor:
        size = x.norm(p=2, dim=over, keepdim=True) if over else x.abs()
        return m.scale * (x * size / (size.mean(make.dim, keepdim=True) + 1e-3)) + m.shift + x

    return Function(run, scale=make.per_channel(), shift=make.per_channel())


LAYERS = {
    "layer_scale": _layer_scale,
    "positions": _positions,
    "times_buffer": _times_buffer,
    "sigmoid_gate": _sigmoid_gate,
    "experts": _experts,
    "weight_standard": _weight_standard,
    "weight_norm": _weight_norm,
    "low_rank": _low_rank,
    "grn": _grn,
}

# -- images ----------------------------------------------------------------------------------


def _train_batch_norm(make: Make) -> nn.Module:
    affine = make.seed % 3 != 0
    return Function(
        lambda m, x: F.batch_norm(x, None, None, m.w, m.b, True),
        w=nn.Parameter(torch.randn(make.width)) if affine else None,
        b=nn.Parameter(torch.randn(make.width)) if affine else None,
    )


def _instance_norm(make: Make) -> nn.Module:
    variant = make.seed % 4
    return nn.InstanceNorm2d(make.width, affine=variant % 2 == 1, track_running_stats=variant >= 2)


def _group_norm(make: Make) -> nn.Module:
    divisors = [k for k in range(1, make.width + 1) if make.width % k == 0]
    groups = divisors[make.seed % len(divisors)]
    return nn.GroupNorm(groups, make.width, affine=make.seed % 5 != 0, eps=1e-3)


def _evo_norm(make: Make) -> nn.Module:
    """EvoNorm S0: a gate over the deviation of a group of channels."""
    groups = 2

    def run(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        grouped = x.reshape(b, groups, c // groups, h, w)
        var = grouped.var(dim=(2, 3, 4), unbiased=False, keepdim=True)
        spread = (var + 1e-3).sqrt().expand(grouped.shape).reshape(b, c, h, w)
        return x * torch.sigmoid(x * m.v) / spread * m.scale + m.shift

    return Function(run, v=make.per_channel(), scale=make.per_channel(), shift=make.per_channel())


def _channel_layer_norm(make: Make) -> nn.Module:
    return Function(
        lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        norm=nn.LayerNorm(make.width),
    )


def _hard_excite(make: Make) -> nn.Module:
    gate = F.hardsigmoid if make.seed % 2 else torch.sigmoid
    return Function(
        lambda m, x: x * gate(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))),
        down=nn.Conv2d(make.width, make.hidden, 1),
        up=nn.Conv2d(make.hidden, make.width, 1, bias=make.seed % 3 > 0),
    )


def _padded_apart(make: Make) -> nn.Module:
    value = (0.0, 0.5)[make.seed % 2]
    mode = ("constant", "constant", "reflect", "replicate")[make.seed % 4]
    options = {"value": value} if mode == "constant" else {}
    return Function(
        lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode, **options)),
        conv=nn.Conv2d(make.width, make.width, 3),
    )


def _smaller_and_back(make: Make) -> nn.Module:
    mode = ("nearest", "bilinear")[make.seed % 2]
    return Function(
        lambda m, x: F.interpolate(m.conv(x), size=(make.edge, make.edge), mode=mode),
        conv=nn.Conv2d(make.width, make.width, min(3, make.edge)),
    )


def _transposed(make: Make) -> nn.Module:
    groups = 2 if make.width % 2 == 0 and make.seed % 2 else 1
    return nn.ConvTranspose2d(make.width, make.width, 3, padding=1, groups=groups)


def _unshuffle(make: Make) -> nn.Module:
    return Function(
        lambda m, x: F.pixel_shuffle(m.mix(F.pixel_unshuffle(x, 2)), 2),
        mix=nn.Conv2d(4 * make.width, 4 * make.width, 1),
    )


def _strided_shuffle(make: Make) -> nn.Module:
    """The channel shuffle of ShuffleNet."""

    def run(m: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        mixed = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return m.conv(mixed)

    return Function(run, conv=nn.Conv2d(make.width, make.width, 3, padding=1, groups=2))


def _spatial_gate(make: Make) -> nn.Module:
    """CBAM: a gate from the mean and the maximum over channels."""

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(m.conv(both))

    return Function(run, conv=nn.Conv2d(2, 1, 3, padding=1))


IMAGES = {
    "train_batch_norm": _train_batch_norm,
    "instance_norm_kinds": _instance_norm,
    "group_norm_kinds": _group_norm,
    "evo_norm": _evo_norm,
    "channel_layer_norm": _channel_layer_norm,
    "hard_excite": _hard_excite,
    "padded_apart": _padded_apart,
    "smaller_and_back": _smaller_and_back,
    "transposed": _transposed,
    "unshuffle": _unshuffle,
    "strided_shuffle": _strided_shuffle,
    "spatial_gate": _spatial_gate,
}

KEEPING: dict[str, dict[str, Callable[[Make], nn.Module]]] = {
    "image": {**REDUCTIONS, **POINTWISE, **LAYERS, **IMAGES},
    "sequence": {**REDUCTIONS, **POINTWISE, **LAYERS, **SEQUENCES},
    "vector": {**REDUCTIONS, **POINTWISE, **LAYERS},
}

_EVEN = {"swap", "evo_norm", "strided_shuffle", "channel_attention"}


def fitting(kind: str, width: int, edge: int) -> list[str]:
    """Ops that fit a value."""
    return [
        name
        for name in KEEPING[kind]
        if not (name in _EVEN and width % 2)
        and not (name == "unshuffle" and (edge % 2 or edge < 2))
        and not (name == "padded_apart" and edge < 3)
    ]
