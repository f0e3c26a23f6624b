"""The eager backend: the graph as one generated Python function."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from torchlathe.backends.base import Capabilities, Configured, FlatCallable, Lowerable

__all__ = ["Eager"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Eager(Configured):
    """Runs op by op; gradients flow, and a value is freed after its last use.

    Common ops are called by their Python binding instead of through ``torch.ops``, which is the
    same op for about a microsecond less; dropout, which is the identity here, is left out.
    """

    name: ClassVar[str] = "eager"

    @property
    def capabilities(self) -> Capabilities:
        """All that torch can do; it is what others are held against."""
        return Capabilities(training=True, live=True, checked=False)

    def lower(self, source: Lowerable) -> FlatCallable:
        """Return the program as a function of its flat inputs."""
        run = _function(source.graph)
        places = source.places()
        # Looking into the registries skips the search of Module.__getattr__ (0.3 us a tensor).
        slots = [
            (owner._parameters if name in owner._parameters else owner._buffers, name)
            for owner, name in places
        ]

        def call(*inputs: Any) -> Any:
            try:
                tensors = [registry[name] for registry, name in slots]
            except KeyError:
                # Someone turned a parameter into an attribute, as parametrizations do.
                tensors = [getattr(owner, name) for owner, name in places]
            return run(*tensors, *inputs)

        return call


def _function(graph: fx.Graph) -> Callable[..., Any]:
    fast = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is aten.dropout.default and not node.args[2]:
            mapping[node] = mapping[node.args[0]]
            continue
        mapping[node] = copied = fast.node_copy(node, mapping.__getitem__)
        if (binding := _BINDINGS.get(node.target)) is not None:
            copied.target = binding
        elif (method := _METHODS.get(node.target)) is not None and _positional(node):
            copied.op, copied.target = "call_method", method
    run: Callable[..., Any] = fx.GraphModule(torch.nn.Module(), fast).forward
    return run


def _positional(node: fx.Node) -> bool:
    # What follows the dtype in Tensor.to is in part by keyword only.
    return not node.kwargs and (node.target is not aten.to.dtype or len(node.args) == 2)


# Overloads whose Python binding takes the same arguments in the same order.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.linear.default: F.linear,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.batch_norm.default: torch.batch_norm,
    aten.layer_norm.default: torch.layer_norm,
    aten.group_norm.default: torch.group_norm,
    aten.embedding.default: torch.embedding,
    aten.scaled_dot_product_attention.default: F.scaled_dot_product_attention,
    aten.matmul.default: torch.matmul,
    aten.cat.default: torch.cat,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.gelu.default: F.gelu,
    aten.relu.default: torch.relu,
    aten.silu.default: torch._C._nn.silu,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.neg.default: operator.neg,
    aten.rsqrt.default: torch.rsqrt,
    aten.softmax.int: torch.softmax,
    aten.flatten.using_ints: torch.flatten,
}
_METHODS: dict[Any, str] = {
    aten.view.default: "view",
    aten.reshape.default: "reshape",
    aten.expand.default: "expand",
    aten.permute.default: "permute",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.squeeze.dim: "squeeze",
    aten.contiguous.default: "contiguous",
    aten.select.int: "select",
    aten.to.dtype: "to",
}
