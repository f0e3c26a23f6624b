"""A program as torch's own exported program of flat tensors, for runtimes that start from one.

Values that are no tensors stay on this side of the boundary: constants among the inputs are left
out, ``None`` and numbers among the outputs are put back, and sizes travel as tensors of no
dimensions. Ops of torchlathe are replaced by the plain torch that they mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from torchlathe.backends.base import Lowerable
from torchlathe.backends.examples import flat_examples
from torchlathe.ir import BackendError, Program
from torchlathe.ir.extents import expression
from torchlathe.ir.quiet import quiet_torch

__all__ = ["Boundary", "exported_program"]

aten = torch.ops.aten


@dataclass(frozen=True)
class _Output:
    """What one flat output of the program is: a tensor, a size, or a constant."""

    index: int | None = None
    is_size: bool = False
    value: Any = None


@dataclass(frozen=True)
class Boundary:
    """Between the flat inputs and outputs of a program and the tensors of its exported form.

    Attributes:
        inputs: Names of the tensor inputs, in order.
        outputs: Names of the tensor outputs, in order.
        takes: Which of the flat inputs they are.
        gives: What each flat output is made of.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    takes: tuple[int, ...]
    gives: tuple[_Output, ...]

    def tensors(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors among flat inputs."""
        return [inputs[index] for index in self.takes]

    def flat(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The flat outputs that these tensors stand for."""
        found: list[Any] = []
        for output in self.gives:
            if output.index is None:
                found.append(output.value)
            elif output.is_size:
                found.append(int(tensors[output.index]))
            else:
                found.append(tensors[output.index])
        return found


def exported_program(
    source: Lowerable,
    *,
    largest: int | None = None,
    rewrite: Callable[[fx.GraphModule], object] = lambda module: None,
) -> tuple[ExportedProgram, Boundary]:
    """Export a program anew, as a function from flat tensors to flat tensors.

    Args:
        source: The program with its tensors.
        largest: Limit of the dynamic dimensions that have none.
        rewrite: Changes the module of the program before it is exported.

    Raises:
        BackendError: It gives no tensor, or torch cannot export it with the dimensions dynamic
            that are dynamic in the program.
    """
    program = source.program
    module = source.graph_module()
    boundary = _tensor_outputs(module, program)
    rewrite(module)
    flat = flat_examples(program)
    args = tuple(flat)
    try:
        with quiet_torch(), torch.no_grad():
            exported = torch.export.export(
                module, args, dynamic_shapes=_dynamic_shapes(program, largest), strict=False
            )
    except Exception as error:
        text = " ".join(line.strip() for line in str(error).splitlines()[:4])
        raise BackendError(
            f"torch.export refuses the program: {type(error).__name__}: {text[:600]}",
            hint='backend="eager" runs every program',
        ) from error
    _check_dynamic(program, exported)
    return _without_own_ops(exported), boundary


def _tensor_outputs(module: fx.GraphModule, program: Program) -> Boundary:
    """Let a module give tensors alone; return what its flat outputs are made of."""
    graph = module.graph
    (output,) = graph.find_nodes(op="output")
    nodes: list[fx.Node] = []
    names: list[str] = []
    gives = []
    inputs = set(graph.find_nodes(op="placeholder"))
    with graph.inserting_before(output):
        for value in output.args[0]:
            if not isinstance(value, fx.Node):
                gives.append(_Output(value=value))
                continue
            is_size = isinstance(value.meta.get("val"), torch.SymInt | int)
            names.append(value.name)
            if is_size:
                value = graph.call_function(
                    aten.scalar_tensor.default, (value,), {"dtype": torch.int64}
                )
            elif value in nodes or value in inputs or value.op == "get_attr":
                # Some runtimes take no output twice, and none that is an input or a weight.
                value = graph.call_function(aten.clone.default, (value,))
            gives.append(_Output(len(nodes), is_size))
            nodes.append(value)
        if not nodes:
            raise BackendError("the program gives no tensor, and there is nothing to lower")
        graph.output(tuple(nodes))
    graph.erase_node(output)
    module.recompile()
    own = program.input_nodes
    takes = [i for i, n in enumerate(own) if isinstance(n.meta.get("val"), torch.Tensor)]
    names = [f"{name}_{i}" if name in names[:i] else name for i, name in enumerate(names)]
    return Boundary(tuple(own[i].name for i in takes), tuple(names), tuple(takes), tuple(gives))


def _dynamic_shapes(program: Program, largest: int | None) -> tuple[Any, ...]:
    found: list[Any] = []
    for node in program.input_nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            found.append(None)
            continue
        dims: dict[int, Any] = {}
        for axis, extent in enumerate(value.shape):
            if isinstance(extent, int):
                continue
            limits = program.range_constraints.get(extent.node.expr)
            upper = None if limits is None else limits.upper
            finite = upper is not None and getattr(upper, "is_Integer", isinstance(upper, int))
            limit = int(upper) if finite else largest
            dims[axis] = Dim.AUTO if limit is None else Dim.AUTO(max=limit)
        found.append(dims or None)
    return tuple(found)


def _check_dynamic(program: Program, exported: ExportedProgram) -> None:
    """Refuse a program of which export has fixed a dimension.

    Raises:
        BackendError: The input and the dimension.
    """
    names = exported.graph_signature.user_inputs
    nodes = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    for node, name in zip(program.input_nodes, names, strict=True):
        before = node.meta.get("val")
        after = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
            continue
        for axis, (want, got) in enumerate(zip(before.shape, after.shape, strict=True)):
            if not isinstance(want, int) and isinstance(expression(got), int):
                raise BackendError(
                    f"dimension {axis} of {node.name} is dynamic in the program, and torch.export "
                    f"makes it {got}",
                    hint="compile with this dimension static, or "
                    'backend="eager", which runs every program',
                )


def _without_own_ops(exported: ExportedProgram) -> ExportedProgram:
    """Ops of torchlathe as what they mean, which other runtimes know."""
    own = {
        node.target
        for node in exported.graph.nodes
        if node.op == "call_function" and str(node.target).startswith("torchlathe.")
    }
    if not own:
        return exported
    from torchlathe.backends.meanings import meaning_of

    with quiet_torch():
        found: ExportedProgram = exported.run_decompositions({op: meaning_of(op) for op in own})
    return found
