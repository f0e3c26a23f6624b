"""A program as JSON, for `torchlathe.backends.artifact`: the writing half."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.backends.encoding import encode, op_name
from torchlathe.backends.structure import encode_structure
from torchlathe.ir import ArtifactError, Program, TensorEntry, info, source_line
from torchlathe.ir.extents import example_sizes

__all__ = ["EXAMPLE_LIMIT", "SavedReport", "plain", "program_json", "record_specs"]

_ENDS = ("placeholder", "output")
# How torch marks nodes of its own making.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
EXAMPLE_LIMIT = 1 << 20  # bytes of an example input that is kept as it is


@dataclass(frozen=True)
class SavedReport:
    """A report as it was read from a file, until something that knows reports takes it over."""

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return self.data


def program_json(program: Program) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Write a program.

    Returns:
        The JSON text with one node a line, and the tensors that it refers to by key.

    Raises:
        ArtifactError: Something in the program has no place in a file.
    """
    return _Writer(program).write()


def record_specs(history: list[Any]) -> str:
    """Text pipeline of what ran, from the records of the passes."""
    specs = [r.get("spec") if isinstance(r, dict) else getattr(r, "spec", None) for r in history]
    return ",".join(spec for spec in specs if isinstance(spec, str))


def plain(value: Any) -> Any:
    """A record or report as plain JSON values: dataclasses as tables, enums by their value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (value if isinstance(value, list | tuple) else sorted(value))]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        # Strict JSON has neither; readers in other languages fail on what Python would write.
        return value if math.isfinite(value) else None
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return plain(value.item())
    return str(value)


class _Writer:
    """One program on its way to JSON; collects the tensors on the side."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, torch.Tensor] = {}
        self.symbols: dict[Any, int] = {}
        self._indices: dict[bytes, str] = {}
        self._sizes = example_sizes(program)
        args, kwargs = program.example_inputs
        self._leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))

    def write(self) -> tuple[bytes, dict[str, torch.Tensor]]:
        program = self.program
        nodes = program.tensor_nodes
        if len(self._leaves) != len(program.input_nodes):
            raise ArtifactError("the example inputs do not have the structure of the inputs")
        document: dict[str, Any] = {
            "model": program.model_name,
            "tensors": [self._entry(n, e, nodes[n]) for n, e in program.entries.items()],
            "carried": [self._entry(n, e, None) for n, e in program.carried.items()],
            "aliases": [list(pair) for pair in program.aliases.items()],
            "dropped": list(program.dropped),
            "rewritten": sorted(program.rewritten),
            "inputs": [
                self._input(n, leaf, i)
                for i, (n, leaf) in enumerate(zip(program.input_nodes, self._leaves, strict=True))
            ],
            "nodes": [self._node(n) for n in program.nodes if n.op not in _ENDS],
            "outputs": [encode(value) for value in _flat_outputs(program)],
            "in_spec": encode_structure(program.in_spec),
            "out_spec": encode_structure(program.out_spec),
            "kept": self._index_table(program.kept),
            "zeroed": self._index_table(program.zeroed),
            "extents": [[name, sorted(axes.items())] for name, axes in program.extents.items()],
            "frozen": [[name, sorted(axes)] for name, axes in program.frozen.items()],
            "history": [plain(record) for record in program.history],
        }
        document["symbols"] = [self._symbol(symbol, hint) for symbol, hint in self.symbols.items()]
        return "".join(_lines(document)).encode(), self.tensors

    # -- tensors -----------------------------------------------------------------------------

    def _entry(self, name: str, entry: TensorEntry, node: fx.Node | None) -> dict[str, Any]:
        self._add(name, entry.tensor)
        data: dict[str, Any] = {"name": name, "kind": entry.kind.value}
        if not entry.persistent:
            data["persistent"] = False
        if entry.tensor.requires_grad:
            data["trained"] = True
        if node is not None:
            data["node"] = node.name
            if by := info(node).created_by:
                data["by"] = by
        # The file has them in row-major order; channels_last and its like are made again.
        if not entry.tensor.is_contiguous() and _dense(entry.tensor):
            data["stride"] = list(entry.tensor.stride())
        return data

    def _add(self, key: str, tensor: torch.Tensor) -> str:
        if key in self.tensors:
            raise ArtifactError(f"two tensors are called {key!r}")
        self.tensors[key] = tensor
        return key

    def _index_table(self, table: Mapping[str, Mapping[int, torch.Tensor]]) -> list[list[Any]]:
        # Tensors of one family lost the same indices, which are stored once.
        rows = []
        for name, axes in sorted(table.items()):
            for axis, indices in sorted(axes.items()):
                indices = indices.detach().cpu().to(torch.int64).contiguous()
                content = indices.numpy().tobytes()
                if content not in self._indices:
                    key = f"torchlathe:indices:{len(self._indices)}"
                    self._indices[content] = self._add(key, indices)
                rows.append([name, axis, self._indices[content]])
        return rows

    # -- inputs and symbols ------------------------------------------------------------------

    def _input(self, node: fx.Node, leaf: Any, index: int) -> dict[str, Any]:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return {"node": node.name, "size": self._extent(value), "example": encode(leaf)}
        if not isinstance(value, torch.Tensor):
            return {"node": node.name, "constant": encode(value)}
        data = {
            "node": node.name,
            "dtype": encode(value.dtype)["dtype"],
            "shape": [self._extent(extent) for extent in value.shape],
        }
        if not _row_major(value):
            data["stride"] = [self._extent(step) for step in value.stride()]
        return data | self._example(leaf.detach(), index)

    def _example(self, leaf: torch.Tensor, index: int) -> dict[str, Any]:
        if leaf.numel() * leaf.element_size() <= EXAMPLE_LIMIT:
            return {"example": self._add(f"torchlathe:input:{index}", leaf)}
        if leaf.is_floating_point():
            deviation, mean = torch.std_mean(leaf.double().nan_to_num(0.0, 0.0, 0.0))
            return {"random": {"size": list(leaf.shape), "of": [float(mean), float(deviation)]}}
        whole = leaf.to(torch.int64)
        return {"random": {"size": list(leaf.shape), "of": [int(whole.min()), int(whole.max())]}}

    def _extent(self, extent: int | torch.SymInt) -> Any:
        return extent if isinstance(extent, int) else self._expression(extent.node.expr)

    def _expression(self, expr: Any) -> Any:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol:
            if expr not in self._sizes:
                raise ArtifactError(f"the size {expr} of an input cannot be found from the others")
            self.symbols.setdefault(expr, self._sizes[expr])
            return {"symbol": self._symbol_name(expr)}
        if expr.is_Add or expr.is_Mul:
            # sympy's own order depends on the process; text does not.
            parts = sorted(expr.args, key=str)
            return {"add" if expr.is_Add else "mul": [self._expression(part) for part in parts]}
        if expr.is_Pow and expr.exp.is_Integer and 0 < int(expr.exp) <= 8:
            return {"mul": [self._expression(expr.base)] * int(expr.exp)}
        raise ArtifactError(f"an input has the size {expr}, which cannot be saved")

    def _symbol_name(self, symbol: Any) -> str:
        # By appearance: torch numbers them anew in each process.
        return f"s{list(self.symbols).index(symbol)}"

    def _symbol(self, symbol: Any, hint: int) -> dict[str, Any]:
        limits = self.program.range_constraints.get(symbol)
        data: dict[str, Any] = {"name": self._symbol_name(symbol), "hint": hint}
        if limits is not None:
            data["range"] = [
                int(end) if getattr(end, "is_Integer", isinstance(end, int)) else None
                for end in (limits.lower, limits.upper)
            ]
        return data

    # -- nodes -------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> dict[str, Any]:
        if node.op != "call_function":
            raise ArtifactError(f"{node.op} {node.target} cannot be saved")
        data: dict[str, Any] = {
            "name": node.name,
            "op": op_name(node.target),
            "args": [encode(arg) for arg in node.args],
        }
        if node.kwargs:
            data["kwargs"] = [[key, encode(value)] for key, value in node.kwargs.items()]
        stack = node.meta.get("nn_module_stack")
        if stack and _NO_MODULE not in stack:
            path, kind = list(stack.values())[-1]
            kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            data["module"] = [str(path), kind]
        if line := source_line(node):
            data["source"] = _portable(line)
        if by := info(node).created_by:
            data["by"] = by
        if instead := info(node).stands_for:
            data["for"] = instead
        return data


def _flat_outputs(program: Program) -> tuple[Any, ...]:
    outputs = program.output_node.args[0]
    assert isinstance(outputs, tuple | list)
    return tuple(outputs)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether the strides are those of a permuted row-major tensor."""
    step = 1
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if extent != 1:
            if stride != step:
                return False
            step *= extent
    return True


def _row_major(value: torch.Tensor) -> bool:
    step: Any = 1
    for stride, extent in zip(reversed(value.stride()), reversed(value.shape), strict=True):
        expr = stride.node.expr if isinstance(stride, torch.SymInt) else stride
        if expr != step:
            return False
        step = step * (extent.node.expr if isinstance(extent, torch.SymInt) else extent)
    return True


def _portable(line: str) -> str:
    """A source line without the place where this machine keeps its packages."""
    for mark in ("site-packages/", "dist-packages/"):
        line = line.rpartition(mark)[2]
    return line


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    """JSON with sorted keys, and each item of a list at the top on a line of its own."""

    def dumped(value: Any) -> str:
        return json.dumps(value, sort_keys=True, allow_nan=False, separators=(", ", ": "))

    parts = []
    for key in sorted(document):
        value = document[key]
        if isinstance(value, list) and value:
            items = ",\n  ".join(map(dumped, value))
            parts.append(f'"{key}": [\n  {items}\n ]')
        else:
            parts.append(f'"{key}": {dumped(value)}')
    yield "{\n " + ",\n ".join(parts) + "\n}\n"
