"""The one object through which a program changes.

Plain FX edits leave three things stale: the metadata of the nodes downstream, the tensors beside
the graph, and the provenance. `Edit` keeps them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.errors import Error, VerifyError
from torchlathe.ir.program import TensorEntry, TensorKind
from torchlathe.ir.provenance import describe, info, set_info

if TYPE_CHECKING:
    from torchlathe.ir.program import Program

__all__ = ["Edit", "fake_run"]


def fake_run(node: fx.Node, mode: Any) -> Any:
    """Run one ``call_function`` node on the fake values of its inputs.

    Raises:
        VerifyError: The op refuses its inputs, for instance because shapes do not fit.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)
    except Error:
        raise
    except Exception as error:
        shapes = [
            f"%{n.name}: {tuple(n.meta['val'].shape)}"
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        ]
        raise VerifyError(
            f"{node.target} does not accept its inputs ({', '.join(shapes)}): {error}",
            where=describe(node),
        ) from error


def _same_value(a: Any, b: Any) -> bool:
    """Whether two fake values are interchangeable as metadata."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.device == b.device
            and a.dim() == b.dim()
            and all(_same_extent(x, y) for x, y in zip(a.shape, b.shape, strict=True))
            and all(_same_extent(x, y) for x, y in zip(a.stride(), b.stride(), strict=True))
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return type(a) is type(b) and _same_extent(a, b)


def _same_extent(a: Any, b: Any) -> bool:
    # Comparing the expressions, not the SymInts, adds no guard to the shape environment.
    a = a.node.expr if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool) else a
    b = b.node.expr if isinstance(b, torch.SymInt | torch.SymFloat | torch.SymBool) else b
    return bool(a == b)


class Edit:
    """Changes to one program, applied together when the ``with`` block ends.

    Attributes:
        program: The program under change; reading it inside the block shows the changes so far,
            with metadata as it was before.
        count: Number of changes so far; zero means that the pass changed nothing.
    """

    def __init__(self, program: Program, by: str) -> None:
        self.program = program
        self.count = 0
        self._by = by
        self._stale: set[fx.Node] = set()

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

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of ``old`` but ``new`` itself read ``new``; dead code goes at the end."""
        users = old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._stale.update(users)
        self.count += 1

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

    def set_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Replace a tensor's value; shape and dtype may change. Tied names follow."""
        name = self.program.aliases.get(name, name)
        entry = self.program.entries[name]
        if isinstance(entry.tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=entry.tensor.requires_grad)
        self.program.entries[name] = replace(entry, tensor=tensor)
        node = self.program.tensor_nodes[name]
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
        first = next(program.nodes)
        with program.graph.inserting_before(first):
            node = program.graph.placeholder("t_" + name.replace(".", "_"))
        set_info(node, tensor=name, created_by=self._by or None)
        node.meta["val"] = self._fake(tensor)
        program.entries[name] = TensorEntry(tensor, kind)
        self.touch(node)
        return node

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
        for axis, indices in axes.items():
            tensor = tensor.index_select(axis, indices.to(tensor.device))
            before = record.get(axis)
            record[axis] = indices if before is None else before[indices]
        self.set_tensor(name, tensor.contiguous())

    def record_zeroed(self, name: str, axis: int, indices: torch.Tensor) -> None:
        """Note that an equal full-size model has zeros at these indices of a tensor's axis.

        Args:
            name: The tensor.
            axis: The axis that writes the erased indices.
            indices: Indices into the tensor as it is now, before `keep`; shape (erased,) int64.
        """
        program = self.program
        name = program.aliases.get(name, name)
        kept = program.kept.get(name, {}).get(axis)
        original = indices if kept is None else kept[indices]
        record = program.zeroed.setdefault(name, {})
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
        mode = program.fake_mode
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if node not in self._stale:
                continue
            value = fake_run(node, mode)
            if "val" not in node.meta or not _same_value(node.meta["val"], value):
                node.meta["val"] = value
                node.meta.pop("tensor_meta", None)
                self._stale.update(node.users)
        program.graph.lint()
        program.graph_module.recompile()
        program.version += 1

    def _drop_dead(self) -> None:
        program = self.program
        program.graph.eliminate_dead_code()
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
        return mode.from_tensor(tensor.detach(), static_shapes=True)
