"""Flattening wrapped regions, and turning in-place ops into functional ones."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir.errors import UnsupportedError
from torchlathe.ir.provenance import describe

__all__ = [
    "drop_statistics_updates",
    "functionalize_in_place",
    "inline_wrapped_regions",
    "make_complex_views_contiguous",
    "write_out_default_eps",
]

# Ops that may return their input, or a view of it, without saying so in the schema.
_MAY_ALIAS = frozenset(
    f"aten::{name}"
    for name in (
        *("alpha_dropout", "dropout", "feature_alpha_dropout", "feature_dropout"),
        *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "einsum", "meshgrid"),
        *("contiguous", "flatten", "pixel_shuffle", "pixel_unshuffle", "reshape", "reshape_as"),
        *("expand_as", "float", "half", "to", "type_as", "view_as"),
    )
)


class _Aliases:
    """Sets of nodes that share, or may share, storage; found in execution order."""

    def __init__(self) -> None:
        self._set_of: dict[fx.Node, list[fx.Node]] = {}
        self._owner: dict[int, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        """Put a node to those that it aliases by its schema or by the storage of its value."""
        self._set_of[node] = [node]
        for other in _aliased_inputs(node):
            self._merge(node, other)
        for storage in _storages(node):
            self._merge(node, self._owner.setdefault(storage, node))

    def of(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that may share storage with this one, itself included."""
        return self._set_of[node]

    def detach(self, node: fx.Node) -> None:
        """Declare a node's value new: from here on its storage is no one else's."""
        self._set_of[node].remove(node)
        self._set_of[node] = [node]
        for storage in _storages(node):
            self._owner[storage] = node

    def _merge(self, a: fx.Node, b: fx.Node) -> None:
        first, second = self._set_of[a], self._set_of[b]
        if first is second:
            return
        small, large = sorted((first, second), key=len)
        large.extend(small)
        for node in small:
            self._set_of[node] = large


def functionalize_in_place(graph: fx.Graph) -> bool:
    """Replace in-place ops by their functional twins; False if some could not be replaced.

    ``relu_(x)`` becomes ``relu(x)`` and later readers of ``x`` read the result, which is right
    only if nothing else can see the write: ``x`` is neither an input nor a parameter, and no
    other view of its storage is read afterwards.

    Raises:
        UnsupportedError: A write through a view that torch cannot tell from a copy.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    aliases = _Aliases()
    complete = True
    for node in list(graph.nodes):
        aliases.add(node)
        if not _mutates(node):
            continue
        target = node.args[0] if node.args else None
        functional = _functional_twin(node)
        if not isinstance(target, fx.Node) or target.op == "placeholder" or functional is None:
            complete = False
            continue
        # What only changes strides or the autograd state of one tensor object is seen by no other.
        writes = torch.Tag.inplace_view not in _tags(node)
        if writes and _seen_elsewhere(node, target, aliases.of(target), order):
            complete = False
            continue
        node.target = functional
        late = [user for user in target.users if order[user] > order[node]]
        for user in late:
            user.replace_input_with(target, node)
        if writes:
            aliases.detach(node)
    return complete


def _seen_elsewhere(
    node: fx.Node, target: fx.Node, aliases: list[fx.Node], order: dict[fx.Node, int]
) -> bool:
    """Whether something but ``target`` shows what ``node`` writes into it."""
    others = [other for other in aliases if other not in (target, node)]
    seen = [other for other in others if any(order[u] > order[node] for u in other.users)]
    if seen and (hidden := [a for a in aliases if _aliases_silently(a)]):
        raise UnsupportedError(
            f"{node.target} writes into the result of {hidden[0].target}, which here is a view "
            "of a tensor that is read afterwards; its schema does not say so, and export takes it "
            "for a copy",
            where=describe(node),
            hint="write the in-place op out of place, or clone the view before",
        )
    return bool(seen) or any(other.op == "placeholder" for other in aliases)


def drop_statistics_updates(graph: fx.Graph) -> None:
    """Take the running statistics from norms that use the batch's own.

    Such a norm reads nothing from them; it would only write to them, which its schema hides.
    """
    for target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            x, weight, bias, _, _, uses_input, *rest = node.args
            if uses_input:
                node.args = (x, weight, bias, None, None, uses_input, *rest)


def write_out_default_eps(graph: fx.Graph) -> None:
    """Give ``rms_norm`` the epsilon that it falls back to, which depends on the input's dtype.

    A run in float64, to compare with, has to use the epsilon of the model.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default):
        eps = node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")
        if eps is None:
            # The op computes in float32 for half-precision inputs.
            dtype = torch.promote_types(node.meta["val"].dtype, torch.float32)
            node.args = node.args[:3]
            node.kwargs = {**node.kwargs, "eps": torch.finfo(dtype).eps}


def make_complex_views_contiguous(graph: fx.Graph) -> None:
    """Put ``contiguous`` before ``view_as_complex``, which wants pairs at even distances.

    It changes nothing where they are; of a slice of an axis of odd extent, as an erase may leave
    it, it makes the copy that the view needs.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default):
        pairs = node.args[0]
        if not isinstance(pairs, fx.Node) or pairs.target is torch.ops.aten.contiguous.default:
            continue
        value = pairs.meta["val"]
        with graph.inserting_before(node), value.fake_mode, enable_python_dispatcher():
            dense = graph.call_function(torch.ops.aten.contiguous.default, (pairs,))
            dense.meta = {**node.meta, "val": torch.ops.aten.contiguous.default(value)}
        node.replace_input_with(pairs, dense)


def _schema(node: fx.Node) -> torch._C.FunctionSchema | None:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema
    return None


def _tags(node: fx.Node) -> list[torch.Tag]:
    return node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []


def _mutates(node: fx.Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _aliases_silently(node: fx.Node) -> bool:
    """Whether a result shares storage with an input although its schema knows of no alias."""
    source = node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source = node.args[0]
    schema = _schema(source)
    if schema is None or any(ret.alias_info is not None for ret in schema.returns):
        return False
    own = set(_storages(node))
    return any(own.intersection(_storages(used)) for used in source.all_input_nodes)


def _aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose storage the node's result shares, or may share."""
    if node.op != "call_function":
        return []
    schema = _schema(node)
    if schema is None:
        # The storage of its value tells which of several results getitem takes.
        return [] if _storages(node) else node.all_input_nodes
    if schema.name in _MAY_ALIAS:
        return node.all_input_nodes
    if any(ret.alias_info is not None for ret in schema.returns):
        return [a for a in node.args[:1] if isinstance(a, fx.Node)]
    return []


def _storages(node: fx.Node) -> list[int]:
    """Storage of the node's fake value, if it is one tensor; views share it as real ones do."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return []
    return [value.untyped_storage()._cdata]


def _functional_twin(node: fx.Node) -> torch._ops.OpOverload | None:
    """``aten.relu.default`` for ``aten.relu_.default``; None where there is no exact twin."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    namespace, name = target._schema.name.split("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    if packet is None:
        return None
    wanted = _arguments(target)
    # Most often it has the same overload name, but pow_.Scalar is the pow.Tensor_Scalar.
    names = sorted(
        packet.overloads(), key=lambda found: found != (target._overloadname or "default")
    )
    for overload in (getattr(packet, found) for found in names):
        if _arguments(overload) == wanted and not overload._schema.is_mutable:
            return overload if _keeps_dtype(node, overload) else None
    return None


def _arguments(op: torch._ops.OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments]


def _keeps_dtype(node: fx.Node, functional: torch._ops.OpOverload) -> bool:
    """Whether the twin gives what the in-place op leaves behind: ``half.add_(float)`` is half."""
    written = node.args[0]
    if not isinstance(written, fx.Node) or not isinstance(written.meta.get("val"), FakeTensor):
        return False
    value = written.meta["val"]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    with value.fake_mode, torch.no_grad(), enable_python_dispatcher():
        result = functional(*args, **kwargs)
    return (
        isinstance(result, torch.Tensor)
        and result.dtype == value.dtype
        and result.dim() == node.meta["val"].dim()
    )


def inline_wrapped_regions(graph: fx.Graph, owner: fx.GraphModule) -> bool:
    """Inline regions that export wraps for ``no_grad`` and for disabled autocast.

    Neither changes a value. Returns False if a submodule is left, for instance of ``torch.cond``
    or of enabled autocast.

    Args:
        graph: The graph to change.
        owner: The module that holds the graphs of the regions.
    """
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
            _, body, *operands = node.args
        elif node.target is torch.ops.higher_order.wrap_with_autocast:
            _, _, enabled, _, body, *operands = node.args
            if enabled:
                continue
        else:
            continue
        assert isinstance(body, fx.Node)
        assert isinstance(body.target, str)
        inner = owner.get_submodule(body.target)
        assert isinstance(inner, fx.GraphModule)
        _inline(graph, node, inner.graph, operands)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)
    return not graph.find_nodes(op="get_attr")


def _inline(graph: fx.Graph, call: fx.Node, body: fx.Graph, operands: list[fx.Node]) -> None:
    mapping: dict[fx.Node, fx.Node] = dict(
        zip(body.find_nodes(op="placeholder"), operands, strict=True)
    )
    with graph.inserting_before(call):
        results = graph.graph_copy(body, mapping)
    results = results if isinstance(results, list | tuple) else (results,)
    for getitem in list(call.users):
        index = getitem.args[1]
        assert isinstance(index, int)
        getitem.replace_all_uses_with(results[index])
        graph.erase_node(getitem)
