"""A program from JSON: the reading half, which trusts nothing that it reads.

Nothing in the file is run on the way: names of nodes must be plain identifiers, ops are looked up
by `torchlathe.backends.encoding.resolve_op`, and shapes are found later, by running the graph on
fake tensors (`torchlathe.backends.completing`).
"""

from __future__ import annotations

import builtins
import json
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    constrain_range,
)
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from torchlathe.backends.encoding import decode, named, resolve_op
from torchlathe.backends.structure import decode_structure
from torchlathe.ir import ArtifactError, Error, Program, TensorEntry, TensorKind
from torchlathe.ir.provenance import set_info

__all__ = ["read_program"]

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SOURCE = re.compile(r"(?P<file>[^\"\n]+):(?P<line>\d+) \((?P<function>[^\s()]+)\)")
_KINDS = {kind.value: kind for kind in TensorKind}
_EXAMPLE_BYTES = 1 << 33  # of one random example input
_LARGEST = 2**63


def read_program(text: bytes, tensors: Mapping[str, torch.Tensor]) -> Program:
    """Make the program that `torchlathe.backends.graph_json.program_json` wrote.

    Args:
        text: The JSON.
        tensors: What it refers to, by key; taken over, not copied.

    Raises:
        ArtifactError: Anything that cannot have been written by it, an op that is not registered
            here, or a graph that does not fit its tensors.
    """
    try:
        return _Reader(json.loads(text), tensors).read()
    except ArtifactError:
        raise
    except Error as error:
        raise ArtifactError(
            f"the graph does not work here: {error.message}",
            where=error.where,
            hint=f"this is torch {torch.__version__}; the manifest names the one that wrote it",
        ) from error
    except Exception as error:
        # Every way in which unexpected JSON can fail to be a graph ends here.
        kind = type(error).__name__
        raise ArtifactError(f"graph.json is not a graph: {kind}: {str(error)[:200]}") from error


class _Reader:
    """One program on its way from JSON."""

    def __init__(self, data: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        if not isinstance(data, dict):
            raise ArtifactError("graph.json is not a table")
        self.data: dict[str, Any] = data
        self.tensors = tensors
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.environment)
        self.symbols: dict[str, Any] = {}
        self.ranges: dict[Any, ValueRanges[Any]] = {}

    def read(self) -> Program:
        model = self._text(self.data["model"])
        if not model.isidentifier():
            raise ArtifactError(f"{model[:80]!r} is not the name of a model")
        for row in self.data["symbols"]:
            self._symbol(row)
        entries = {r["name"]: self._entry(r) for r in self.data["tensors"]}
        carried = {r["name"]: self._entry(r) for r in self.data["carried"]}
        examples = [self._input(row) for row in self.data["inputs"]]
        for row in self.data["nodes"]:
            self._node(row)
        self.graph.output(tuple(decode(value, self.nodes) for value in self.data["outputs"]))
        in_spec = decode_structure(self.data["in_spec"])
        out_spec = decode_structure(self.data["out_spec"])
        if out_spec.num_leaves != len(self.data["outputs"]):
            raise ArtifactError("the outputs do not have the structure that the file gives them")
        aliases = {self._text(a): self._text(n) for a, n in self.data["aliases"]}
        if not set(aliases.values()) <= set(entries):
            raise ArtifactError("a tied name has no tensor")
        args, kwargs = pytree.tree_unflatten(examples, in_spec)
        self.graph.lint()
        program = Program(
            self.graph,
            entries,
            in_spec=in_spec,
            out_spec=out_spec,
            example_inputs=(tuple(args), dict(kwargs)),
            aliases=aliases,
            carried=carried,
            dropped=[self._text(name) for name in self.data["dropped"]],
            range_constraints=self.ranges,
            model_name=model,
        )
        program.rewritten = frozenset(self._text(name) for name in self.data["rewritten"])
        program.kept = self._index_table(self.data["kept"])
        program.zeroed = self._index_table(self.data["zeroed"])
        program.extents = {
            self._text(name): {self._whole(axis): self._whole(size) for axis, size in axes}
            for name, axes in self.data.get("extents", ())
        }
        program.frozen = {
            self._text(name): frozenset(map(self._whole, axes))
            for name, axes in self.data.get("frozen", ())
        }
        program.history = [dict(record) for record in self.data["history"]]
        return program

    # -- symbols -----------------------------------------------------------------------------

    def _symbol(self, row: Mapping[str, Any]) -> None:
        """Make a symbolic size with the public means of fake tensors: as the size of one."""
        name, hint = self._text(row["name"]), row["hint"]
        least, greatest = row.get("range", (None, None))
        lower = 0 if least is None else self._whole(least)
        upper = int_oo if greatest is None else self._whole(greatest)
        # 0 and 1 would become constants.
        like = torch.empty(max(self._whole(hint), 2), device="meta")
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake = self.mode.from_tensor(like, symbolic_context=context)
        size = fake.shape[0]
        if not isinstance(size, torch.SymInt):
            raise ArtifactError(f"the size {name} cannot be symbolic")
        if greatest is not None and upper >= max(lower, 2):
            constrain_range(size, min=max(lower, 2), max=upper)
        self.symbols[name] = size
        if "range" in row:
            self.ranges[size.node.expr] = ValueRanges(lower, upper)

    def _extent(self, data: Any) -> Any:
        if isinstance(data, dict) and len(data) == 1:
            ((kind, content),) = data.items()
            if kind == "symbol":
                return named(self.symbols, content, "size")
            if kind in ("add", "mul") and isinstance(content, list) and len(content) <= 64:
                parts = [self._extent(part) for part in content]
                return sum(parts) if kind == "add" else math.prod(parts)
        return self._whole(data)

    # -- tensors -----------------------------------------------------------------------------

    def _entry(self, row: Mapping[str, Any]) -> TensorEntry:
        name = self._text(row["name"])
        kind = _KINDS[row["kind"]]
        tensor = named(self.tensors, name, "tensor")
        if "stride" in row:
            stride = [self._whole(step) for step in row["stride"]]
            tensor = _restrided(tensor, stride)
        if kind is TensorKind.PARAMETER:
            tensor = torch.nn.Parameter(tensor, requires_grad=bool(row.get("trained")))
        entry = TensorEntry(tensor, kind, persistent=row.get("persistent", True) is not False)
        if "node" in row:
            node = self._placeholder(row["node"])
            set_info(node, tensor=name, created_by=self._maybe_text(row.get("by")))
            node.meta["val"] = self.mode.from_tensor(tensor.detach(), static_shapes=True)
        return entry

    def _placeholder(self, name: Any) -> fx.Node:
        node = self.graph.placeholder(self._new_name(name))
        return self._add(name, node)

    def _add(self, name: str, node: fx.Node) -> fx.Node:
        if hasattr(builtins, name):
            node.name = name  # FX renames what shadows a builtin, as the input "input" does
        self.nodes[name] = node
        return node

    def _index_table(self, rows: Any) -> dict[str, dict[int, torch.Tensor]]:
        table: dict[str, dict[int, torch.Tensor]] = {}
        for name, axis, key in rows:
            indices = named(self.tensors, key, "tensor")
            if indices.dim() != 1 or indices.dtype is not torch.int64:
                raise ArtifactError(f"{name} has indices that are none")
            table.setdefault(self._text(name), {})[self._whole(axis)] = indices
        return table

    # -- inputs ------------------------------------------------------------------------------

    def _input(self, row: Mapping[str, Any]) -> Any:
        """Make a placeholder, and return the example input for it."""
        node = self._placeholder(row["node"])
        if "constant" in row:
            node.meta["val"] = decode(row["constant"], {})
            return node.meta["val"]
        if "size" in row:
            node.meta["val"] = self._extent(row["size"])
            return decode(row["example"], {})
        dtype = decode({"dtype": row["dtype"]}, {})
        shape = [self._extent(extent) for extent in row["shape"]]
        with self.mode:
            if "stride" in row:
                stride = [self._extent(step) for step in row["stride"]]
                node.meta["val"] = torch.empty_strided(shape, stride, dtype=dtype)
            else:
                node.meta["val"] = torch.empty(shape, dtype=dtype)
        if "example" in row:
            return named(self.tensors, row["example"], "tensor")
        return self._random(dtype, row["random"])

    def _random(self, dtype: torch.dtype, row: Mapping[str, Any]) -> torch.Tensor:
        size = [self._whole(extent) for extent in row["size"]]
        if math.prod(size) * dtype.itemsize > _EXAMPLE_BYTES:
            raise ArtifactError(f"an example input has the size {size}, which is too large")
        generator = torch.Generator().manual_seed(0)
        first, second = row["of"]
        if dtype.is_floating_point:
            drawn: torch.Tensor = torch.randn(size, generator=generator) * second + first
        else:
            drawn = torch.randint(first, second + 1, size, generator=generator)
        return drawn.to(dtype)

    # -- nodes -------------------------------------------------------------------------------

    def _node(self, row: Mapping[str, Any]) -> None:
        name = row["name"]
        target = resolve_op(row["op"])
        args = tuple(decode(arg, self.nodes) for arg in row["args"])
        kwargs = {
            self._identifier(key): decode(value, self.nodes) for key, value in row.get("kwargs", [])
        }
        node = self.graph.create_node(
            "call_function", target, args, kwargs, name=self._new_name(name)
        )
        self._add(name, node)
        if "module" in row:
            path, kind = row["module"]
            node.meta["nn_module_stack"] = {"module": (self._text(path), self._text(kind))}
        if "source" in row and (match := _SOURCE.fullmatch(row["source"])):
            frame = f'File "{match["file"]}", line {match["line"]}, in {match["function"]}'
            node.meta["stack_trace"] = f"  {frame}\n"
        if "by" in row:
            instead = self._maybe_text(row.get("for"))
            set_info(node, created_by=self._text(row["by"]), stands_for=instead)
        if not isinstance(target, torch._ops.OpOverload):
            _check_arithmetic(node, row["op"])

    # -- plain values ------------------------------------------------------------------------

    def _new_name(self, name: Any) -> str:
        """A name for a node; it ends up in generated code, so it must be a name and new."""
        text = self._identifier(name)
        if text in self.nodes:
            raise ArtifactError(f"two nodes are called {text}")
        return text

    def _identifier(self, name: Any) -> str:
        if isinstance(name, str) and _NAME.fullmatch(name) and not keyword.iskeyword(name):
            return name
        raise ArtifactError(f"{str(name)[:80]!r} is not a name")

    def _text(self, value: Any) -> str:
        if not isinstance(value, str) or not value.isprintable():
            raise ArtifactError(f"{str(value)[:80]!r} is not a text")
        return value

    def _maybe_text(self, value: Any) -> str | None:
        return None if value is None else self._text(value)

    def _whole(self, value: Any) -> int:
        if type(value) is not int or not 0 <= value < _LARGEST:
            raise ArtifactError(f"{str(value)[:80]!r} is not a size")
        return value


def _restrided(tensor: torch.Tensor, stride: list[int]) -> torch.Tensor:
    reach = sum(step * (n - 1) for step, n in zip(stride, tensor.shape, strict=True))
    if tensor.numel() and reach + 1 != tensor.numel():
        raise ArtifactError("a tensor has strides that do not fit its shape")
    wanted = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype)
    wanted.copy_(tensor)
    return wanted


def _check_arithmetic(node: fx.Node, name: str) -> None:
    """Keep Python's own arithmetic to sizes: it would multiply texts and raise to any power."""
    numbers: list[Any] = [value for value in node.args if not isinstance(value, fx.Node)]
    plain = all(type(v) in (bool, int, float) and abs(v) < _LARGEST for v in numbers)
    large_power = name == "operator.pow" and any(abs(v) > 64 for v in numbers if plain)
    if not plain or node.kwargs or large_power:
        raise ArtifactError(f"{node.name} does not compute a size: {str(node.args)[:80]}")
