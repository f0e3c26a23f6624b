"""Slots by the weights of their experts: what the ops of all formats have in common.

A slot is one token that one expert handles; slots are sorted by expert, and ``offsets`` says where
each expert's begin. A linear layer by type of node is the same, with types for experts.
Source: grouped products over sorted tokens are MegaBlocks' (arXiv 2211.15841).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.blocks.launching import Packed, Routing, launch
from torchlathe.kernels.epilogue import finished, rows_for
from torchlathe.kernels.registering import no_backward, with_defaults
from torchlathe.kernels.tuning.tiles import Tile

__all__ = [
    "differentiate_experts",
    "experts_linear",
    "launch_experts",
    "reference_of_experts",
    "route",
    "stacked",
    "token_blocks",
]

_Packs = TypeVar("_Packs", bound=tuple[Any, ...])

# Slots of an expert, on average, above which dequantised products win.
_MOST = 64


def experts_linear(
    x: Tensor,
    offsets: Tensor,
    packed: Packed,
    unpacked: Callable[[torch.dtype], Tensor],
    *,
    out_features: int,
    dtype: torch.dtype,
    x_scales: Tensor | None = None,
    order: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """An op for experts: the kernel on a GPU for few slots of an expert, else a grouped product.

    Args:
        x: (tokens, in).
        offsets: (experts + 1,) int32, from 0 to the number of slots.
        packed: The weights, with experts first.
        unpacked: Gives the weights in a type, scales included, (experts, rows, columns).
        out_features: Features of the result.
        dtype: Type of the result.
        x_scales: (tokens,), where x has 8 bits.
        order: (slots,) integers, the token of each slot; None if slots are tokens.
        places: (slots,) integers, a permutation: the row of the result that each slot goes to.
        weights: (slots,) fp32, what results are multiplied by.
        activation: As `torchlathe.kernels.blocks.launching.linear` takes it.

    Returns:
        (slots, out).
    """
    slots = x.shape[0] if order is None else order.shape[0]
    experts = packed.weight.shape[0]
    if x.device.type != "cpu" and slots <= _MOST * experts:
        tile = _tile(slots // experts, x.dtype)
        return launch(
            x,
            packed,
            tile,
            out_features=out_features,
            dtype=dtype,
            x_scales=x_scales,
            activation=activation,
            routing=route(offsets, tile.BM, slots, experts, order, places, weights),
            wrap=torch.library.wrap_triton,
        )
    # On a CPU products of integers are summed in fp32, which holds them.
    wide = x.dtype if x_scales is None else torch.bfloat16
    if x_scales is not None and x.device.type == "cpu":
        wide = torch.float32
    rows = rows_for(out_features, activation)
    weight = unpacked(wide)[:, :rows, : x.shape[1]]
    taken = x.to(wide) if order is None else x.to(wide).index_select(0, order)
    if wide == torch.bfloat16:
        # Rows and columns in eights, because the library wants 16 bytes.
        more = (0, -x.shape[1] % 8, 0, -rows % 8)
        taken, weight = F.pad(taken, more[:2]), F.pad(weight, more)
        ends = offsets[1:].to(torch.int32)
        product = torch._grouped_mm(taken, weight.transpose(1, 2), offs=ends)
    else:
        product = _product_by_blocks(taken, weight, offsets)
    product = product[:, :rows].to(torch.float32)
    if x_scales is not None:
        product = (
            product * (x_scales if order is None else x_scales.index_select(0, order))[:, None]
        )
    out = finished(product, None, None, activation, out_features)
    if weights is not None:
        out = out * weights[:, None]
    if places is not None:
        out = torch.empty_like(out).index_copy(0, places.to(torch.int64), out)
    return out.to(dtype)


def _product_by_blocks(taken: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What ``torch._grouped_mm`` gives, which takes bf16 alone: products of blocks of slots."""
    slots, experts = taken.shape[0], weight.shape[0]
    BM = slots // experts + 1
    expert, first, last = token_blocks(offsets, BM, slots, experts).to(torch.int64).unbind(1)
    at = first[:, None] + torch.arange(BM, device=taken.device)
    # One row more takes what the last blocks have too much.
    at = torch.where(at < last[:, None], at, slots)
    blocks = F.pad(taken, (0, 0, 0, 1))[at]
    product = torch.bmm(blocks, weight.index_select(0, expert).mT)
    out = product.new_zeros(slots + 1, weight.shape[1])
    return out.index_put((at,), product)[:slots]


def _tile(tokens: int, dtype: torch.dtype) -> Tile:
    """A tile for so many tokens of an expert: none is split, for experts fill the device."""
    # Products of fp8 by 8 tokens go through fp16.
    small = ((8, 64),) if dtype != torch.float8_e4m3fn else ()
    for BM, BN in (*small, (16, 128)):
        if tokens <= BM:
            return Tile(BM, BN)
    return Tile(32, 128)


def stacked(packs: Sequence[_Packs]) -> _Packs:
    """The packed weights of each expert as one, experts first.

    Args:
        packs: Tuples of tensors, one for each expert, alike in what is None.
    """
    first = packs[0]
    make: Any = type(first)
    parts = zip(*packs, strict=True)
    whole: _Packs = make(*(None if part[0] is None else torch.stack(part) for part in parts))
    return whole


def launch_experts(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    packed: Packed,
    tile: Tile,
    *,
    weights: Tensor | None = None,
    places: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Run the kernel with a tile, as tests do; `experts_linear` says what the arguments are.

    Returns:
        (slots, out).
    """
    slots = x.shape[0] if order is None else order.shape[0]
    routing = route(offsets, tile.BM, slots, packed.weight.shape[0], order, places, weights)
    return launch(x, packed, tile, routing=routing, **{"dtype": x.dtype} | options)


def differentiate_experts(op: Any, weight_of: Callable[[tuple[Any, ...]], Tensor]) -> None:
    """Give an op for experts a backward for its activations and for the router's weights.

    The weights of the experts are quantised, and get none.

    Args:
        op: An op with arguments ``x``, ``order``, ``offsets``, ``weights``, ``activation`` and
            ``places``.
        weight_of: Gives the weights, (experts, rows, columns), from the op's arguments; rows and
            columns may be padded.
    """
    names = [argument.name for argument in op._opoverload._schema.arguments]
    wanted = ("x", "order", "offsets", "weights", "activation", "places")
    places = {name: names.index(name) for name in wanted}

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        inputs = with_defaults(op, inputs)
        ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in inputs))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        )
        given = {name: inputs[place] for name, place in places.items()}
        if given["activation"] != "none":
            raise no_backward(str(given["activation"]))
        weight = weight_of(inputs).to(grad.dtype)
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        needed = {name: ctx.needs_input_grad[places[name]] for name in ("x", "weights")}
        of_x, of_weights = _gradients(grad, weight, needed, given)
        found[places["x"]], found[places["weights"]] = of_x, of_weights
        return tuple(found)

    op.register_autograd(backward, setup_context=setup)


def _gradients(
    grad: Tensor, weight: Tensor, needed: Mapping[str, bool], given: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, (tokens, in), and of the router's weights, (slots,)."""
    x, order, offsets = given["x"], given["order"], given["offsets"]
    if given["places"] is not None:
        grad = grad.index_select(0, given["places"])
    of_x = of_weights = None
    taken = x if order is None else x.index_select(0, order)
    weight = weight[:, : grad.shape[1], : x.shape[1]]
    if needed["weights"] and given["weights"] is not None:
        product = _product_by_blocks(taken.to(grad.dtype), weight, offsets)
        of_weights = (grad * product).sum(1).to(given["weights"].dtype)
    if needed["x"]:
        scaled = grad if given["weights"] is None else grad * given["weights"][:, None]
        slots = _product_by_blocks(scaled.to(grad.dtype), weight.mT, offsets)
        of_x = slots if order is None else torch.zeros_like(x).index_add(0, order, slots)
    return of_x, of_weights


def route(
    offsets: Tensor,
    BM: int,
    slots: int,
    experts: int,
    order: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
) -> Routing:
    """What the kernel wants to know of slots, for blocks of BM of them."""
    return Routing(
        None if order is None else order.to(torch.int32),
        None if places is None else places.to(torch.int32),
        weights,
        token_blocks(offsets, BM, slots, experts),
        slots,
    )


def token_blocks(offsets: Tensor, BM: int, slots: int, experts: int) -> Tensor:
    """Cut each expert's slots in blocks of BM, on the device, without asking it how many.

    Returns:
        (blocks, 3) int32: expert, first slot, one past the last; there are as many blocks as there
        could be, and those that are not needed are empty.
    """
    most = torch.sym_min(experts, slots) + slots // BM
    starts = offsets.to(torch.int64)
    each = (starts.diff() + (BM - 1)) // BM
    ends = each.cumsum(0)
    block = torch.arange(most, device=offsets.device)
    expert = torch.searchsorted(ends, block, right=True)
    real = expert < experts
    expert = expert.clamp_max(experts - 1)
    done = (ends - each).index_select(0, expert)
    first = starts.index_select(0, expert) + (block - done) * BM
    last = torch.minimum(first + BM, starts.index_select(0, expert + 1))
    first, last = torch.where(real, first, 0), torch.where(real, last, 0)
    return torch.stack((expert, first, last), 1).to(torch.int32)


def reference_of_experts(
    x: Tensor,
    offsets: Tensor,
    weight_of: Callable[[int], Tensor],
    *,
    out_features: int,
    dtype: torch.dtype,
    x_scales: Tensor | None = None,
    order: Tensor | None = None,
    places: Tensor | None = None,
    weights: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of the ops, expert by expert, in fp32, or in float64 for float64 results."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = x.to(wide)
    if x_scales is not None:
        numbers = numbers * x_scales.to(wide)[:, None]
    slots = numbers if order is None else numbers[order.to(torch.int64)]
    rows = rows_for(out_features, activation)
    out = torch.zeros(slots.shape[0], out_features, dtype=wide, device=x.device)
    for e, (first, last) in enumerate(pairwise(offsets.tolist())):
        product = F.linear(slots[first:last], weight_of(e).to(wide)[:rows, : x.shape[1]])
        out[first:last] = finished(product, None, None, activation, out_features)
    if weights is not None:
        out = out * weights.to(wide)[:, None]
    if places is not None:
        out = torch.empty_like(out).index_copy(0, places.to(torch.int64), out)
    return out.to(dtype)
