"""The Program: one captured FX graph, its tensors, and what was done to it."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.ir.analysis import Analysis
from torchlathe.ir.provenance import info

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torchlathe.ir.cost import ProgramCost
    from torchlathe.ir.edit import Edit

__all__ = ["Program", "TensorEntry", "TensorKind", "copy_graph"]

R = TypeVar("R")


class TensorKind(enum.Enum):
    """What a lifted tensor is to the model."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that the graph reads, under the name that it had in the model.

    Attributes:
        tensor: The value. Shared with the caller's model until a pass replaces it; never written
            to in place.
        kind: Parameter, buffer or constant (a tensor literal of the forward code).
        persistent: Whether the tensor is part of the state dict.
    """

    tensor: torch.Tensor
    kind: TensorKind
    persistent: bool = True


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy in which each node keeps its name; FX renames those that Python knows, ``input``."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, mapping)
    for node, copied in mapping.items():
        copied.name = node.name
    outputs = graph.find_nodes(op="output")
    copy.output(result).meta.update(outputs[0].meta)
    return copy


class _GraphNote:
    """What a graph was, to make it again if an edit fails.

    Making nodes takes many times longer than noting what they are, and hardly an edit fails.
    """

    def __init__(self, graph: fx.Graph) -> None:
        # FX replaces arguments as a whole and never writes into them; metadata it does.
        self._rows = [
            (n, n.op, n.target, n.args, n.kwargs, n.name, n.type, dict(n.meta)) for n in graph.nodes
        ]

    def rebuild(self) -> fx.Graph:
        """A new graph of new nodes, equal to the one that was noted."""
        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node, op, target, args, kwargs, name, kind, meta in self._rows:
            new_args, new_kwargs = fx.map_arg((args, kwargs), made.__getitem__)
            new = graph.create_node(op, target, new_args, new_kwargs, name=name, type_expr=kind)
            new.name = name  # FX renames those that Python knows, ``input``
            new.meta = meta
            made[node] = new
        return graph


class Program:
    """A model as one flat FX graph in functional ATen, with its tensors beside it.

    The graph is in lifted form: its placeholders are first the tensors (``info(node).tensor``
    names the entry), then the flattened inputs in the order of the original signature. Each node
    has ``meta["val"]`` (fake tensors with symbolic shapes). Passes change a program only
    through `edit`; everything else here reads.

    Attributes:
        graph: The FX graph; a pass author reads it as any other FX graph.
        entries: Tensors by name; tied names appear once, see ``aliases``.
        aliases: Further names of a tied tensor, to the name that ``entries`` has.
        carried: Buffers that the forward code never reads but that the state dict has.
        dropped: Names of parameters that the forward code never reads.
        in_spec: Pytree spec of ``(args, kwargs)``.
        out_spec: Pytree spec of the outputs.
        example_inputs: The ``(args, kwargs)`` that the program was captured with.
        range_constraints: Allowed ranges of symbolic dimensions.
        kept: Per tensor and axis, the original indices that are left (absent: all).
        zeroed: Per tensor and axis, the original indices whose slices an equal full-size model
            has at zero.
        extents: Per tensor and axis of which indices went, how many the original had.
        frozen: Per tensor, the axes along which constants were computed from it: new zeros there
            would be those of a model with other constants.
        rewritten: Tensors that passes gave other values than the model has, or added.
        history: One record per pass that ran (JSON-able dataclasses, made by the pass manager).
        model_name: Class name of the captured module.
    """

    def __init__(
        self,
        graph: fx.Graph,
        entries: Mapping[str, TensorEntry],
        *,
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        example_inputs: tuple[tuple[Any, ...], dict[str, Any]],
        aliases: Mapping[str, str] | None = None,
        carried: Mapping[str, TensorEntry] | None = None,
        dropped: Sequence[str] = (),
        range_constraints: Mapping[Any, Any] | None = None,
        model_name: str = "Model",
    ) -> None:
        self.graph = graph
        self.entries = dict(entries)
        self.aliases = dict(aliases or {})
        self.carried = dict(carried or {})
        self.dropped = tuple(dropped)
        self.in_spec = in_spec
        self.out_spec = out_spec
        self.example_inputs = example_inputs
        self.range_constraints = dict(range_constraints or {})
        self.kept: dict[str, dict[int, torch.Tensor]] = {}
        self.zeroed: dict[str, dict[int, torch.Tensor]] = {}
        self.extents: dict[str, dict[int, int]] = {}
        self.frozen: dict[str, frozenset[int]] = {}
        self.rewritten: frozenset[str] = frozenset()
        self.history: list[Any] = []
        self.model_name = model_name
        self.version = 0
        self._analyses: dict[Analysis[Any], tuple[tuple[int, ...], Any]] = {}
        self._editing = False
        self._module: tuple[int, fx.GraphModule] | None = None

    # -- reading ---------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph as a module that can be called with tensors and inputs, made on demand.

        Generating its code takes longer than copying a graph does, and most copies of a program
        are only read.
        """
        if self._module is None or self._module[0] != self.version:
            module = fx.GraphModule(torch.nn.Module(), self.graph, self.model_name)
            self._module = (self.version, module)
        return self._module[1]

    @property
    def nodes(self) -> Iterator[fx.Node]:
        """All nodes in execution order."""
        return iter(self.graph.nodes)

    @property
    def tensor_nodes(self) -> dict[str, fx.Node]:
        """Placeholders of the tensors, by tensor name."""
        found = {}
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            if (name := info(node).tensor) is not None:
                found[name] = node
        return found

    @property
    def input_nodes(self) -> list[fx.Node]:
        """Placeholders of the flattened user inputs, in order."""
        return [n for n in self.graph.find_nodes(op="placeholder") if info(n).tensor is None]

    @property
    def output_node(self) -> fx.Node:
        """The one output node; ``args[0]`` holds the flattened outputs."""
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The fake tensor mode of the metadata, with the shape environment of the capture."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
                mode: FakeTensorMode = value.fake_mode
                return mode
        raise AssertionError("a program without any fake tensor")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name; tied names lead to the one tensor that they share."""
        return self.entries[self.aliases.get(name, name)].tensor

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters by name, each tied one once."""
        return {
            name: entry.tensor
            for name, entry in self.entries.items()
            if entry.kind is TensorKind.PARAMETER
        }

    def analysis(self, wanted: Analysis[R] | type[Analysis[R]]) -> R:
        """Return an analysis' result, computing it unless it is cached and still valid."""
        key = wanted() if isinstance(wanted, type) else wanted
        cached = self._analyses.get(key)
        if cached is not None and cached[0] == self.state():
            result: R = cached[1]
            return result
        result = key.compute(self)
        self._analyses[key] = (self.state(), result)
        return result

    def state(self) -> tuple[int, ...]:
        """What cached results are valid for: the version, and what was written into tensors."""
        return (self.version, *(_writes(entry.tensor) for entry in self.entries.values()))

    def cached_analyses(self) -> dict[Analysis[Any], Any]:
        """The results that are valid for the program as it is now."""
        state = self.state()
        return {key: result for key, (at, result) in self._analyses.items() if at == state}

    def adopt_analyses(self, results: Mapping[Analysis[Any], Any]) -> None:
        """Declare results that were computed for an earlier version valid for this one."""
        state = self.state()
        self._analyses |= {key: (state, result) for key, result in results.items()}

    def cost(self) -> ProgramCost:
        """Parameters, bytes and FLOPs per node and in total (`torchlathe.ir.cost`)."""
        from torchlathe.ir.cost import Cost

        return self.analysis(Cost)

    def to_text(self, *, axis_terms: bool = False) -> str:
        """The program as deterministic text, with shapes and dtypes (and axis terms)."""
        from torchlathe.ir.printing import program_text

        return program_text(self, axis_terms=axis_terms)

    def fingerprint(self) -> str:
        """A hash that changes whenever the graph, or which tensors it reads, changes."""
        digest = hashlib.sha256()
        for node in self.graph.nodes:
            digest.update(f"{node.name}|{node.op}|{node.target}|{node.args}|{node.kwargs}".encode())
        for name, entry in self.entries.items():
            digest.update(f"{name}|{id(entry.tensor)}|{_writes(entry.tensor)}".encode())
        return digest.hexdigest()

    # -- running ---------------------------------------------------------------------------

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flatten call arguments to the order of ``input_nodes``, and check them.

        Raises:
            InputError: Another structure, dtype, rank or static extent than was captured, or a
                changed non-tensor argument.
        """
        from torchlathe.ir.inputs import flatten_inputs

        return flatten_inputs(self, args, kwargs)

    def unflatten_outputs(self, outputs: Sequence[Any]) -> Any:
        """Put flat outputs back into the structure that the model returns."""
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def run(
        self,
        *args: Any,
        replace_tensor: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the graph node by node (slow; for checking).

        Args:
            *args: As the model takes them.
            replace_tensor: Called with each tensor's name and value at its use; for instance to
                zero slices without copying the model.
            dtype: Compute in this floating dtype; tensors are converted one at a time.
            **kwargs: As the model takes them.
        """
        from torchlathe.ir.interpreting import run_flat

        flat = self.flatten_inputs(args, kwargs)
        outputs = run_flat(self, flat, replace_tensor=replace_tensor, dtype=dtype)
        return self.unflatten_outputs(outputs)

    # -- changing --------------------------------------------------------------------------

    @contextmanager
    def edit(self, by: str = "") -> Iterator[Edit]:
        """The only way to change a program; see `torchlathe.ir.edit.Edit`.

        On leaving, dead code and dead tensors go, metadata is recomputed and the program gets a
        new version. An exception inside leaves the program as it was.

        Args:
            by: Text form of the pass that edits, kept as provenance of new nodes.
        """
        from torchlathe.ir.edit import Edit

        if self._editing:
            raise AssertionError("a program can be edited by one edit at a time")
        before, note = self._copy_around(self.graph), _GraphNote(self.graph)
        self._editing = True
        edit = Edit(self, by)
        try:
            yield edit
            edit.finish()
        except BaseException:
            before.graph = note.rebuild()
            self.restore(before)
            raise
        finally:
            self._editing = False

    def copy(self) -> Program:
        """A copy with its own graph; tensors are shared, since nobody writes to them."""
        return self._copy_around(copy_graph(self.graph))

    def _copy_around(self, graph: fx.Graph) -> Program:
        """A program of this graph with all else as it is here."""
        other = Program(
            graph,
            self.entries,
            in_spec=self.in_spec,
            out_spec=self.out_spec,
            example_inputs=self.example_inputs,
            aliases=self.aliases,
            carried=self.carried,
            dropped=self.dropped,
            range_constraints=self.range_constraints,
            model_name=self.model_name,
        )
        other.kept = {name: dict(axes) for name, axes in self.kept.items()}
        other.zeroed = {name: dict(axes) for name, axes in self.zeroed.items()}
        other.extents = {name: dict(axes) for name, axes in self.extents.items()}
        other.frozen = dict(self.frozen)
        other.rewritten = self.rewritten
        other.history = list(self.history)
        other.version = self.version
        return other

    def restore(self, other: Program) -> None:
        """Become what ``other`` is; used to roll back."""
        self.graph = other.graph
        self._module = None
        self.entries = dict(other.entries)
        self.aliases = dict(other.aliases)
        self.carried = dict(other.carried)
        self.dropped = other.dropped
        self.in_spec, self.out_spec = other.in_spec, other.out_spec
        self.example_inputs = other.example_inputs
        self.range_constraints = dict(other.range_constraints)
        self.model_name = other.model_name
        self.kept = {name: dict(axes) for name, axes in other.kept.items()}
        self.zeroed = {name: dict(axes) for name, axes in other.zeroed.items()}
        self.extents = {name: dict(axes) for name, axes in other.extents.items()}
        self.frozen = dict(other.frozen)
        self.rewritten = other.rewritten
        self.history = list(other.history)
        # Results of analyses hold nodes, and the nodes of a copy are other objects.
        self._analyses = {}
        self.version += 1

    def __repr__(self) -> str:
        nodes = sum(1 for n in self.graph.nodes if n.op == "call_function")
        count = sum(t.numel() for t in self.parameters.values())
        return f"<Program of {self.model_name}: {nodes} ops, {count:,} parameters>"


def _writes(tensor: torch.Tensor) -> int:
    """How often a tensor was written to in place, where torch counts it."""
    return 0 if tensor.is_inference() else tensor._version
