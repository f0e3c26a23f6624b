"""The executorch backend: a ``.pte`` for phones and small devices, by XNNPACK on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from torchlathe.backends.base import Capabilities, Configured, Lowerable
from torchlathe.backends.exporting import Boundary, exported_program
from torchlathe.backends.meanings import meaning_of
from torchlathe.ir import BackendError, OptionError
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.files import atomic
from torchlathe.ir.quiet import quiet_torch

aten = torch.ops.aten

__all__ = ["ExecuTorch", "MethodRun"]


@dataclass(frozen=True)
class ExecuTorch(Configured):
    """Lowers by ``executorch.exir``, and runs in ExecuTorch's Python runtime.

    ``compiled.export("model.pte")`` writes the program. Memory is planned ahead for the largest
    size of each dynamic dimension, hence the limit on those that have none of their own. Weights of
    few bits are stored as floating ones; activations that a program rounds are rounded.

    Args:
        xnnpack: Give what XNNPACK takes to it; the rest runs in portable kernels, which are slow.
        largest: Largest extent of a dynamic dimension that the model itself does not limit.
    """

    name: ClassVar[str] = "executorch"

    xnnpack: bool = True
    largest: int = 256

    def __post_init__(self) -> None:
        """Hold the options to their types and ranges.

        Raises:
            OptionError: A value that cannot be.
        """
        super().__post_init__()
        if self.largest < 2:
            raise OptionError(f"largest must be at least 2, got {self.largest}")

    @property
    def capabilities(self) -> Capabilities:
        """Inference on tensors of the CPU in float32."""
        return Capabilities(
            dtypes=(torch.float32,),
            devices=("cpu",),
            packages=("executorch",),
            extra="executorch",
        )

    def lower(self, source: Lowerable) -> MethodRun:
        """Lower the program, and load it into the runtime.

        Raises:
            BackendError: An op that ExecuTorch does not have.
        """
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        exported, boundary = exported_program(source, largest=self.largest, rewrite=_prepared)
        try:
            with quiet_torch(), torch.no_grad():
                edge = to_edge_transform_and_lower(exported, partitioner=self._partitioners())
                data = edge.to_executorch().buffer
                program = Runtime.get().load_program(data)
                method = program.load_method("forward")
        except Exception as error:
            text = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise BackendError(
                f"ExecuTorch does not take {source.name}: {type(error).__name__}: {text[:500]}",
                hint='backend="eager" runs every program',
            ) from error
        return MethodRun(data, (program, method), method.execute, boundary)

    def _partitioners(self) -> list[Any]:
        if not self.xnnpack:
            return []
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        return [XnnpackPartitioner()]


def _prepared(module: fx.GraphModule) -> None:
    _dequantised(module)
    _apart(module)


def _apart(module: fx.GraphModule) -> None:
    """Variance and mean by an op each, as the core set of ATen has them."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=aten.var_mean.correction):
        x, dims = node.args[0], argument(node, "dim")
        keep = {"keepdim": argument(node, "keepdim", False)}
        with graph.inserting_before(node):
            correction = {"correction": argument(node, "correction"), **keep}
            variance = graph.call_function(aten.var.correction, (x, dims), correction)
            mean = graph.call_function(aten.mean.dim, (x, dims), keep)
        for user in list(node.users):
            user.replace_all_uses_with((variance, mean)[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    module.recompile()


def _dequantised(module: fx.GraphModule) -> None:
    """Store floating weights for those of few bits.

    XNNPACK takes a stored integer for one of its own quantised types, and multiplies by a scale
    that nobody gave it.
    """
    graph = module.graph
    for number, node in enumerate(list(graph.nodes)):
        if str(node.target) != "torchlathe.dequantize.default":
            continue
        tensors = {n: _stored(module, n) for n in node.all_input_nodes}
        if any(tensor is None for tensor in tensors.values()):
            continue
        args = fx.node.map_arg(node.args, tensors.__getitem__)
        name = f"dequantised_{number}"
        module.register_buffer(name, meaning_of(node.target)(*args))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name))
    graph.eliminate_dead_code()
    module.recompile()


def _stored(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    if node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    return found.detach() if isinstance(found, torch.Tensor) else None


class MethodRun:
    """A loaded method as a function of flat inputs.

    Args:
        data: Bytes of the ``.pte``.
        keep: What must live as long as the method.
        execute: Runs the method on a list of tensors.
        boundary: Between the program's inputs and outputs and the method's.
    """

    def __init__(
        self, data: Any, keep: Any, execute: Callable[[list[Any]], Any], boundary: Boundary
    ) -> None:
        self._data = data
        self._keep = keep
        self._execute = execute
        self._boundary = boundary

    def __call__(self, *inputs: Any) -> list[Any]:
        """Run the method; its outputs are copied, since the next call reuses their memory."""
        tensors = [t.detach().contiguous() for t in self._boundary.tensors(inputs)]
        with torch.no_grad():
            return self._boundary.flat([t.clone() for t in self._execute(tensors)])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the ``.pte``, at once or not at all."""
        with atomic(path) as draft:
            draft.write_bytes(bytes(self._data))
