"""Attention written out in matrix products, where that is faster than the fused kernel."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import fx

from torchlathe.ir.axes.rule import argument

__all__ = ["SHORT", "write_out_attention"]

aten = torch.ops.aten

# The fused kernel for CPUs multiplies block by block and head by head. Up to this length one
# batched product for all heads was 1.3 to 1.8 times as fast; at 197 there was no difference.
SHORT: Final = 128
# Of scores, which have to stay in the cache: with 6 MiB of them it took 1.12 times as long.
_MOST_BYTES: Final = 4 * 2**20


def write_out_attention(module: fx.GraphModule, longest: int = SHORT) -> int:
    """Replace attention over short sequences by what it computes.

    The sum is divided by after the second product, not before: it is over ``keys`` columns there
    and over ``head_dim`` here, and the inductor, which looks for attention that is written out to
    fuse it, leaves this form alone. Rows of which every key is masked give zeros, as the fused
    kernel's do. Source: own.

    Args:
        module: Its nodes have fake tensors in ``meta["val"]``; changed in place.
        longest: Of how many queries and keys at most.

    Returns:
        How many were replaced: float32 on a CPU, of static shape, with as many heads of keys as of
        queries, neither causal nor with dropout, and at most 4 MiB of scores.
    """
    graph = module.graph
    count, masks = 0, dict[fx.Node, fx.Node]()
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        if not _is_short(node, longest):
            continue
        with graph.inserting_before(node):
            new = _written_out(graph, node, masks)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    if count:
        module.recompile()
    return count


def _is_short(node: fx.Node, longest: int) -> bool:
    if any(argument(node, name) for name in ("dropout_p", "is_causal", "enable_gqa")):
        return False
    query, key, value = (argument(node, name).meta["val"] for name in ("query", "key", "value"))
    for tensor in (query, key, value):
        if tensor.ndim != 4 or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
        if not all(isinstance(extent, int) for extent in tensor.shape):
            return False
        if tensor.shape[:2] != query.shape[:2] or not 0 < tensor.shape[2] <= longest:
            return False
    if query.shape[:3].numel() * key.shape[2] * query.itemsize > _MOST_BYTES:
        return False
    if (mask := argument(node, "attn_mask")) is None:
        return True
    taken = mask.meta["val"]
    if taken.ndim == 4 and not (taken.shape[0] == 1 or taken.shape[0] == query.shape[0]):
        return False
    return taken.dtype in (torch.float32, torch.bool)


def _written_out(graph: fx.Graph, node: fx.Node, masks: dict[fx.Node, fx.Node]) -> fx.Node:
    query, key, value = (argument(node, name) for name in ("query", "key", "value"))
    mask = argument(node, "attn_mask")
    (batch, heads, queries, width), keys = query.meta["val"].shape, key.meta["val"].shape[2]
    scale = argument(node, "scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    call = graph.call_function
    query = call(aten.mul.Tensor, (query, scale))
    # A copy that the inductor fuses with what is before it: a view alone would hang on strides,
    # which are others when a program is exported than when it is compiled.
    packed: dict[str, Any] = {"memory_format": torch.contiguous_format}
    query, key, value = (
        call(aten.view.default, (call(aten.clone.default, (x,), packed), [batch * heads, *tail]))
        for x, tail in (
            (query, (queries, width)),
            (key, (keys, width)),
            (value, (keys, node.meta["val"].shape[3])),
        )
    )
    scores = call(aten.bmm.default, (query, call(aten.transpose.int, (key, 1, 2))))
    if mask is not None:
        scores = call(aten.reshape.default, (scores, [batch, heads, queries, keys]))
        if mask.meta["val"].dtype == torch.bool:
            mask = masks.get(mask) or masks.setdefault(mask, _added(graph, mask))
        scores = call(aten.add.Tensor, (scores, mask))
        scores = call(aten.reshape.default, (scores, [batch * heads, queries, keys]))
    largest = call(aten.amax.default, (call(aten.detach.default, (scores,)), [-1], True))
    # Of a row of which all is hidden: -inf less -inf is no number, and nothing over nothing none.
    # Of any other the largest weight is exp(0), and the sum at least 1.
    largest = call(aten.clamp_min.default, (largest, torch.finfo(torch.float32).min))
    weights = call(aten.exp.default, (call(aten.sub.Tensor, (scores, largest)),))
    total = call(aten.sum.dim_IntList, (weights, [-1], True))
    total = call(aten.clamp_min.default, (total, 1.0))
    mixed = call(aten.div.Tensor, (call(aten.bmm.default, (weights, value)), total))
    return call(aten.reshape.default, (mixed, [*node.meta["val"].shape]))


def _added(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """A mask as what is added to the scores, once for all that share it."""
    call, place = graph.call_function, mask.next
    while place.op in ("placeholder", "get_attr"):
        place = place.next
    with graph.inserting_before(place):
        hidden = call(aten.scalar_tensor.default, (-math.inf,), {"dtype": torch.float32})
        shown = call(aten.scalar_tensor.default, (0.0,), {"dtype": torch.float32})
        added = call(aten.where.self, (mask, shown, hidden))
        # Changes nothing, and has the inductor store the mask, as it does for costly functions
        # that are read more than once: it would be computed for each score of each layer again.
        return call(aten.log.default, (call(aten.exp.default, (added,)),))
