"""The cost analysis: parameters, bytes and FLOPs per node and in total."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from torchlathe.ir.analysis import Analysis
from torchlathe.ir.cost.arithmetic import has_softmax, is_free, other_flops, reads_rows
from torchlathe.ir.cost.calls import Call, Value, read_call, value_of
from torchlathe.ir.cost.flops import FLOPS
from torchlathe.ir.extents import Extent, as_int, example_sizes, expression, symbol_names
from torchlathe.ir.program import TensorKind
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    import sympy

    from torchlathe.ir.program import Program

__all__ = ["Cost", "NodeCost", "ProgramCost"]


@dataclass(frozen=True)
class NodeCost:
    """What one node costs; integers, or sympy expressions in the symbolic extents.

    Attributes:
        flops: Of contractions, as ``torch.utils.flop_counter`` counts.
        other_flops: Of everything else, by the rule of `torchlathe.ir.cost.arithmetic`.
        bytes_read: Bytes of the distinct tensors that are read; none for a view.
        bytes_written: Bytes of the results; none for a view.
        parameters: Number of elements of the distinct parameters that are read.
    """

    flops: Extent = 0
    other_flops: Extent = 0
    bytes_read: Extent = 0
    bytes_written: Extent = 0
    parameters: int = 0


@dataclass(frozen=True)
class ProgramCost:
    """What a program costs: per node, in total, and at given sizes.

    Attributes:
        nodes: Cost of each call by the name of its node.
        parameters: Number of elements of all parameters, tied ones once.
        bytes: Size of the parameters and buffers, those that only the state dict has included.
        flops: Sum over the nodes.
        other_flops: Sum over the nodes.
        activation_bytes: All bytes that the nodes write; what a run without any reuse would hold.
        symbols: The symbolic extents by the names that ``program.to_text()`` gives them.
        sizes: Their values at the example inputs.
    """

    nodes: Mapping[str, NodeCost]
    parameters: int
    bytes: int
    flops: Extent
    other_flops: Extent
    activation_bytes: Extent
    symbols: Mapping[str, sympy.Symbol] = field(default_factory=dict)
    sizes: Mapping[sympy.Symbol, int] = field(default_factory=dict)

    def flops_at(self, sizes: Mapping[str | sympy.Symbol, int] | None = None) -> int:
        """The FLOPs at these sizes.

        Args:
            sizes: Value of each symbolic extent, by name (``{"s0": 8}``) or symbol; where absent,
                as in the example inputs.

        Raises:
            InputError: A size depends on data, and none was given.
        """
        return as_int(self.flops, self._at(sizes))

    def at(self, sizes: Mapping[str | sympy.Symbol, int] | None = None) -> ProgramCost:
        """The whole cost in integers; see `flops_at`."""
        values = self._at(sizes)
        memo: dict[Extent, int] = {}

        def concrete(extent: Extent) -> int:
            if extent not in memo:
                memo[extent] = as_int(extent, values)
            return memo[extent]

        nodes = {
            name: NodeCost(
                concrete(cost.flops),
                concrete(cost.other_flops),
                concrete(cost.bytes_read),
                concrete(cost.bytes_written),
                cost.parameters,
            )
            for name, cost in self.nodes.items()
        }
        return replace(
            self,
            nodes=nodes,
            flops=concrete(self.flops),
            other_flops=concrete(self.other_flops),
            activation_bytes=concrete(self.activation_bytes),
        )

    def _at(self, sizes: Mapping[str | sympy.Symbol, int] | None) -> dict[sympy.Symbol, int]:
        given = {
            self.symbols.get(key, key) if isinstance(key, str) else key: value
            for key, value in (sizes or {}).items()
        }
        return {**self.sizes, **given}


@dataclass(frozen=True)
class Cost(Analysis[ProgramCost]):
    """Count parameters, bytes and FLOPs; see `ProgramCost`."""

    name: ClassVar[str] = "cost"

    def compute(self, program: Program) -> ProgramCost:
        """Count every node once; calls of equal shapes share one computation."""
        values: dict[fx.Node, Any] = {}
        counted: dict[Call, NodeCost] = {}
        parameters = _parameter_sizes(program)
        nodes: dict[str, NodeCost] = {}
        for node in program.nodes:
            if "val" in node.meta:
                values[node] = value_of(node.meta["val"])
            if node.op != "call_function":
                continue
            call = read_call(node, values)
            cost = counted.get(call)
            if cost is None:
                cost = counted[call] = _call_cost(call, node)
            read = sum(parameters.get(used, 0) for used in node.all_input_nodes)
            nodes[node.name] = replace(cost, parameters=read) if read else cost
        return ProgramCost(
            nodes=nodes,
            parameters=sum(parameters.values()),
            bytes=_state_bytes(program),
            flops=_total(cost.flops for cost in nodes.values()),
            other_flops=_total(cost.other_flops for cost in nodes.values()),
            activation_bytes=_total(cost.bytes_written for cost in nodes.values()),
            symbols={name: symbol for symbol, name in symbol_names(program).items()},
            sizes=example_sizes(program),
        )


def _call_cost(call: Call, node: fx.Node) -> NodeCost:
    if is_free(call):
        return NodeCost()
    formula = FLOPS.get(call.name)
    flops = formula(call) if formula is not None else _registered_flops(node)
    inputs = list({used: value for used, value in _tensor_inputs(node)}.values())
    written = sum(out.nbytes for out in call.outputs)
    read = sum(value.nbytes for value in inputs)
    if reads_rows(call) and inputs:
        read = read - inputs[0].nbytes + written
    # What contracts nothing after all, einsum("i,j->ij") for one, is arithmetic like any other.
    pure = formula is not None and flops != 0 and not has_softmax(call)
    other = 0 if pure else other_flops(call)
    return NodeCost(flops, other, read, written)


def _tensor_inputs(node: fx.Node) -> list[tuple[fx.Node, Value]]:
    found = []
    for used in node.all_input_nodes:
        value = value_of(used.meta.get("val"))
        if isinstance(value, Value):
            found.append((used, value))
    return found


def _registered_flops(node: fx.Node) -> Extent:
    """FLOPs of a custom op by ``torch.utils.flop_counter.register_flop_formula``, if it has one."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return 0
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(target.overloadpacket)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    flops: Extent = expression(formula(*args, **kwargs, out_val=node.meta.get("val")))
    return flops


def _parameter_sizes(program: Program) -> dict[fx.Node, int]:
    sizes = {}
    for node in program.tensor_nodes.values():
        name = info(node).tensor
        assert name is not None
        entry = program.entries[name]
        if entry.kind is TensorKind.PARAMETER:
            sizes[node] = _elements(node, entry.tensor)
    return sizes


def _elements(node: fx.Node, tensor: torch.Tensor) -> int:
    """Elements of a parameter; of one that is packed, the numbers and not the bytes."""
    for user in node.users:
        if str(user.target) == "torchlathe.dequantize.default" and user.args[0] is node:
            return int(user.meta["val"].numel())
    return tensor.numel()


def _state_bytes(program: Program) -> int:
    entries = [*program.entries.values(), *program.carried.values()]
    return sum(
        entry.tensor.numel() * entry.tensor.element_size()
        for entry in entries
        if entry.kind is not TensorKind.CONSTANT
    )


def _total(extents: Iterable[Extent]) -> Extent:
    """Add up; equal expressions are multiplied, since adding expressions one by one is slow."""
    terms = [extent * count for extent, count in Counter(extents).items()]
    symbolic = [term for term in terms if not isinstance(term, int)]
    number = sum(term for term in terms if isinstance(term, int))
    if not symbolic:
        return number
    import sympy

    return sympy.Add(*symbolic, number)
