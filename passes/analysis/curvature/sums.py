"""What a sweep adds to, and how much memory that may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes import rule_of
from torchlathe.ir.axes.rules.contraction import Convolution
from torchlathe.passes.analysis.curvature.objective import Vector
from torchlathe.passes.statistics.accumulators import Accumulator, Allocate, Samples, Total
from torchlathe.passes.statistics.layers import LayerMoments
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.readers import Reader, patches, readers_of, unfolds

__all__ = ["LayerSums", "ParameterSums", "grouped", "largest", "layer_sums"]

Rows = Callable[[torch.Tensor], torch.Tensor]


class ParameterSums:
    """What is added up of one parameter.

    Attributes:
        gradient: Of the loss.
        diagonal: Of a curvature.
        hessian: Samples of the trace of the Hessian's block.
        ggn: Samples of the trace of the Gauss-Newton matrix' block.
    """

    def __init__(self, like: torch.Tensor, allocate: Allocate) -> None:
        self.gradient = Total(like, allocate)
        self.diagonal = Total(like, allocate)
        self.hessian = Samples()
        self.ggn = Samples()


class LayerSums:
    """Kronecker factors of layers, as sums.

    Attributes:
        outputs: Per layer those of the vectors drawn for its result.
        inputs: Per layer those of its rows; layers that read one value alike share them.
        observed: Per node the sums that its value is added to, with how rows are made of it.
    """

    def __init__(self) -> None:
        self.outputs: dict[Reader, Moments] = {}
        self.inputs: dict[Reader, Moments] = {}
        self.observed: dict[fx.Node, list[tuple[Moments, Rows]]] = {}

    def moments(self) -> dict[fx.Node, LayerMoments]:
        """Of the layers that the loss depends on, by node."""
        return {
            reader.node: LayerMoments(reader, self.inputs[reader], outputs, unfolds(reader))
            for reader, outputs in self.outputs.items()
            if outputs.count and self.inputs[reader].count
        }

    def accumulators(self) -> Iterator[tuple[str, Accumulator]]:
        """All sums, each with a name of its own."""
        for index, moments in enumerate(dict.fromkeys(self.inputs.values())):
            yield f"inputs {index}", moments
        for reader, moments in self.outputs.items():
            yield f"outputs {reader.node.name}", moments


def layer_sums(
    program: Program, names: Iterable[str], dtype: torch.dtype, allocate: Allocate
) -> LayerSums:
    """Empty sums for all layers whose weights are among the names.

    Args:
        program: Whose layers.
        names: Of parameters.
        dtype: Of the factors.
        allocate: Gives memory for them.
    """
    wanted = set(names)
    sums = LayerSums()
    shared: dict[tuple[Any, ...], Moments] = {}
    for reader in readers_of(program).values():
        if reader.weight not in wanted or not _factored(reader):
            continue
        # Layers that read one value in the same way share its moments.
        key: tuple[Any, ...] = (reader.operand, reader.data_axes, reader.groups, reader.read)
        if unfolds(reader):
            key = (reader,)
        if key not in shared:
            shared[key] = Moments(matrix=True, dtype=dtype, allocate=allocate)
            rows: Any = partial(patches, reader) if unfolds(reader) else reader.data_rows
            sums.observed.setdefault(reader.operand, []).append((shared[key], rows))
        sums.inputs[reader] = shared[key]
        sums.outputs[reader] = Moments(matrix=True, dtype=dtype, allocate=allocate)
    return sums


def grouped(parameters: Vector, limit_bytes: int) -> list[tuple[str, ...]]:
    """Parameters in order, in groups of at most so many bytes, or of one.

    Args:
        parameters: By name.
        limit_bytes: For one vector of a group.
    """
    groups: list[list[str]] = []
    used = 0
    for name, tensor in parameters.items():
        size = _bytes(tensor)
        if not groups or used + size > limit_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return [tuple(group) for group in groups]


def largest(parameters: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]) -> int:
    """Bytes of one vector of the largest group."""
    return max((sum(_bytes(parameters[n]) for n in group) for group in groups), default=0)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _factored(reader: Reader) -> bool:
    """Whether the weight has the rows of the layer's result: all but unusual convolutions."""
    return unfolds(reader) or not isinstance(rule_of(reader.node), Convolution)
