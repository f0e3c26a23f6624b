"""The one object through which a program changes.

Plain FX edits leave three things stale: the metadata of the nodes downstream, the tensors beside
the graph, and the provenance. `Edit` keeps them together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir.fakes import FakeValues, fake_run, same_value
from torchlathe.ir.program import TensorEntry, TensorKind
from torchlathe.ir.provenance import info, set_info

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["Edit", "fake_run", "has_effect"]


def has_effect(node: fx.Node) -> bool:
    """Whether a node does something besides giving a value, so that it stays if nobody reads it.

    Ops that may draw random numbers, dropout and attention among them, have none: FX keeps these
    by default, and all that they read with them.
    """
    return node.is_impure(impure_random=False)


def _select(tensor: torch.Tensor, axis: int, indices: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor) and not isinstance(indices, FakeTensor):
        # Captured without memory for the weights: what is left has a shape and no values either.
        return tensor.index_select(axis, tensor.fake_mode.from_tensor(indices))
    return tensor.index_select(axis, indices.to(tensor.device))


def _dense_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Without gaps, and with the axes in memory in the order that another tensor has them."""
    layout = suggest_memory_format(like)
    if like.is_contiguous(memory_format=layout):
        return tensor.contiguous(memory_format=layout)
    # A view of a transposed parameter relies on its order.
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda axis: -strides[axis])
    back = sorted(range(like.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


class Edit:
    """Changes to one program, applied together when the ``with`` block ends.

    Attributes:
        program: The program under change; reading it inside the block shows the changes so far,
            with metadata as it was before.
        count: Number of changes so far; zero means that the pass changed nothing.
        stands_for: The node before the edit that a replacement took the place of.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.count = 0
        self._by = by
        self.stands_for: dict[fx.Node, fx.Node] = {}
        self._stale: set[fx.Node] = set()
        self._shapes: dict[fx.Node, Sequence[Sequence[Any]]] = {}
        self._tensor_nodes = program.tensor_nodes

    # -- graph -----------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: fx.Node,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """Insert a call.

        Args:
            target: An ATen overload, a registered op or an ``operator`` function.
            args: Arguments; nodes stand for their values.
            kwargs: Keyword arguments.
            like: The node whose module path and source line the new node takes over.
            before: Insert before this node; by default right after ``like``.
        """
        graph = self.program.graph
        point = graph.inserting_before(before) if before else graph.inserting_after(like)
        with point:
            node = graph.call_function(target, args, dict(kwargs or {}))
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        set_info(node, created_by=self._by or None)
        self.touch(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node, users: Iterable[fx.Node] | None = None) -> None:
        """Let users of ``old`` read ``new`` instead; dead code goes at the end.

        Args:
            old: The node that was read.
            new: What stands for it from now on.
            users: Which users; by default all but ``new`` itself. Collect them before making
                ``new`` out of several nodes that read ``old``.
        """
        for user in [u for u in old.users if u is not new] if users is None else users:
            user.replace_input_with(old, new)
            self._stale.add(user)
        self.stands_for[new] = self.stands_for.get(old, old)
        if info(new).created_by is not None:
            set_info(new, stands_for=info(old).stands_for or old.name)
        self.count += 1

    def set_shape(self, node: fx.Node, shapes: Sequence[Sequence[Any]]) -> None:
        """Tell the new shapes of a node's results, so that they need not be propagated.

        Args:
            node: A node that an op rule has adapted.
            shapes: Per tensor result, extents (ints, and SymInts as they were).
        """
        self._shapes[node] = shapes

    def set_args(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Give a node other arguments; keyword arguments stay unless given."""
        new_kwargs = node.kwargs if kwargs is None else dict(kwargs)
        if args == node.args and new_kwargs == node.kwargs:
            return
        node.args = args
        node.kwargs = new_kwargs
        self.touch(node)

    def set_target(self, node: fx.Node, target: Callable[..., Any]) -> None:
        """Let a node call another op with the arguments that it has."""
        node.target = target
        self.touch(node)

    def touch(self, node: fx.Node) -> None:
        """Note that a node was changed by FX's own means."""
        self._stale.add(node)
        self.count += 1

    # -- tensors ---------------------------------------------------------------------------

    def set_tensor(self, name: str, tensor: torch.Tensor, *, rewrites: bool = True) -> None:
        """Replace a tensor's value; shape and dtype may change. Tied names follow.

        Args:
            name: The tensor.
            tensor: Its new value.
            rewrites: Whether a zeroed copy of the original stops being the program's equal by
                this; False for what only makes up for erased slices.
        """
        name = self.program.aliases.get(name, name)
        entry = self.program.entries[name]
        if isinstance(entry.tensor, torch.nn.Parameter):
            # Only floating tensors have gradients; a quantised parameter has none.
            trains = entry.tensor.requires_grad and tensor.is_floating_point()
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=trains)
        if rewrites:
            self.program.rewritten |= {name}
        self.program.entries[name] = replace(entry, tensor=tensor)
        node = self._tensor_nodes[name]
        node.meta["val"] = self._fake(tensor)
        self.touch(node)
        self._stale.update(node.users)

    def add_tensor(
        self, name: str, tensor: torch.Tensor, kind: TensorKind = TensorKind.BUFFER
    ) -> fx.Node:
        """Add a tensor and return its placeholder.

        Raises:
            ValueError: The name is taken.
        """
        program = self.program
        if name in program.entries or name in program.aliases or name in program.carried:
            raise ValueError(f"a tensor named {name} exists")
        if kind is TensorKind.PARAMETER and not isinstance(tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        # FX makes names of nodes differ, but argument names of its code out of what is given here.
        target = "t_" + re.sub(r"\W", "_", name)
        taken = {node.target for node in program.graph.find_nodes(op="placeholder")}
        while target in taken:
            target += "_"
        first = next(program.nodes)
        with program.graph.inserting_before(first):
            node = program.graph.placeholder(target)
        set_info(node, tensor=name, created_by=self._by or None)
        node.meta["val"] = self._fake(tensor)
        program.entries[name] = TensorEntry(tensor, kind)
        self._tensor_nodes[name] = node
        self.touch(node)
        return node

    def tie(self, name: str, to: str) -> None:
        """Let everything that reads one tensor read another; its name stays, as an alias.

        Args:
            name: The tensor that goes, with what is on record of its indices.
            to: The tensor that stands for both from now on; its value does not change.

        Raises:
            ValueError: Their shapes, dtypes or kinds differ.
        """
        program = self.program
        name, to = program.aliases.get(name, name), program.aliases.get(to, to)
        if name == to:
            return
        old, new = program.entries[name], program.entries[to]
        for a, b in (
            (old.tensor.shape, new.tensor.shape),
            (old.tensor.dtype, new.tensor.dtype),
            (old.kind, new.kind),
        ):
            if a != b:
                raise ValueError(f"{name} and {to} cannot be tied: {a} against {b}")
        node, other = self._tensor_nodes.pop(name), self._tensor_nodes[to]
        for user in list(node.users):
            user.replace_input_with(node, other)
            self._stale.add(user)
        program.graph.erase_node(node)
        del program.entries[name]
        for record in (program.kept, program.zeroed, program.extents, program.frozen):
            record.pop(name, None)
        for alias in [a for a, n in program.aliases.items() if n == name]:
            program.aliases[alias] = to
        program.aliases[name] = to
        program.rewritten |= {name, to}
        self.count += 1

    def keep(self, name: str, axes: Mapping[int, torch.Tensor]) -> None:
        """Keep only these indices of a tensor's axes, and remember the original indices.

        Args:
            name: The tensor.
            axes: Per axis, sorted indices into the tensor as it is now; shape (kept,) int64.
        """
        program = self.program
        name = program.aliases.get(name, name)
        tensor = program.entries[name].tensor.detach()
        record = program.kept.setdefault(name, {})
        extents = program.extents.setdefault(name, {})
        for axis, indices in axes.items():
            extents.setdefault(axis, tensor.shape[axis])
            tensor = _select(tensor, axis, indices)
            before = record.get(axis)
            record[axis] = indices if before is None else before[indices]
        kept = _dense_like(tensor, program.entries[name].tensor)
        self.set_tensor(name, kept, rewrites=False)

    def record_zeroed(self, name: str, axis: int, indices: torch.Tensor) -> None:
        """Note that an equal full-size model has zeros at these indices of a tensor's axis.

        Args:
            name: The tensor.
            axis: The axis that writes the erased indices.
            indices: Indices into the tensor as it is now, before `keep`; shape (erased,) int64.
                None at all, before anything else, says that the original has no such tensor.
        """
        program = self.program
        name = program.aliases.get(name, name)
        kept = program.kept.get(name, {}).get(axis)
        original = indices if kept is None else kept[indices]
        record = program.zeroed.setdefault(name, {})
        if record and not any(map(len, record.values())):
            return
        shape = program.entries[name].tensor.shape
        if axis < len(shape):  # a scalar has no axis, and is zeroed as a whole
            program.extents.setdefault(name, {}).setdefault(axis, shape[axis])
        if axis in record:
            original = torch.cat([record[axis], original]).unique()
        record[axis] = original

    # -- finishing -------------------------------------------------------------------------

    def finish(self) -> None:
        """Drop dead code and tensors, recompute metadata downstream of changes, recompile."""
        if not self.count:
            return
        program = self.program
        self._drop_dead()
        values = FakeValues(program.fake_mode)
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            shapes = self._shapes.get(node)
            if node not in self._stale and shapes is None:
                continue
            value = None if shapes is None else values.resized(node, shapes)
            if value is not None:
                node.meta["val"] = value
                node.meta.pop("tensor_meta", None)
                continue
            value = values.run(node)
            if "val" not in node.meta or not same_value(node.meta["val"], value):
                node.meta["val"] = value
                node.meta.pop("tensor_meta", None)
                self._stale.update(node.users)
        program.graph.lint()
        program.version += 1

    def _drop_dead(self) -> None:
        program = self.program
        for node in reversed(program.graph.nodes):
            # FX's own asks of each node whether it has an effect, and of few does it matter.
            if not node.users and node.op not in ("placeholder", "output") and not has_effect(node):
                program.graph.erase_node(node)
        for name, node in program.tensor_nodes.items():
            if not node.users:
                program.graph.erase_node(node)
                del program.entries[name]
                for alias in [a for a, n in program.aliases.items() if n == name]:
                    del program.aliases[alias]

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        mode = self.program.fake_mode
        if getattr(tensor, "fake_mode", None) is mode:
            return tensor
        # Tensors beside the graph are plain and static, so this needs none of from_tensor's care.
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(mode, meta, tensor.device)
