"""What a backend is, and how one is found by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any, Protocol, runtime_checkable

import torch
from torch import fx

from torchlathe.backends.completing import complete
from torchlathe.ir import BackendError, Program, info

__all__ = [
    "ENTRY_POINTS",
    "Backend",
    "FlatCallable",
    "Lowerable",
    "Origin",
    "backend_names",
    "get_backend",
]

ENTRY_POINTS = "torchlathe.backends"

FlatCallable = Callable[..., Sequence[Any]]

_TABLE = {
    "eager": "torchlathe.backends.eager:Eager",
    "inductor": "torchlathe.backends.inductor:Inductor",
    "module": "torchlathe.backends.module:ModuleBackend",
}


@dataclass(frozen=True)
class Origin:
    """Where a program came from, for a backend that goes back to the module's own code.

    Attributes:
        module: The module that was captured, or one of its size that a lowering made.
        before: The program as it was captured, if it is at hand.
        finished: Whether the module is a lowering's own result, for this very program.
    """

    module: torch.nn.Module | None = None
    before: Program | None = None
    finished: bool = False


class Lowerable:
    """A program together with the live tensors that it is to read.

    Attributes:
        tensors: Tree of plain modules that holds each tensor; the compiled model's own registries,
            so an optimizer step or ``load_state_dict`` is seen at the next call.
        paths: Per tensor name of the program, the dotted path in ``tensors``.
        origin: What the program was captured from, where it is known.
    """

    def __init__(
        self,
        program: Program,
        tensors: torch.nn.Module,
        paths: Mapping[str, str],
        origin: Origin | None = None,
    ) -> None:
        self._program = program
        self.tensors = tensors
        self.paths = paths
        self.origin = origin or Origin()

    @property
    def program(self) -> Program:
        """What to run, with the metadata of each node. A backend leaves it as it is."""
        complete(self._program)
        return self._program

    @property
    def graph(self) -> fx.Graph:
        """The graph of the program, of a loaded one at no cost: its nodes may lack metadata."""
        return self._program.graph

    @property
    def name(self) -> str:
        """Class name of the captured module."""
        return self._program.model_name

    @property
    def dynamic(self) -> bool:
        """Whether an input has a symbolic dimension."""
        return any(
            not isinstance(extent, int)
            for node in self._program.input_nodes
            if isinstance(value := node.meta.get("val"), torch.Tensor)
            for extent in value.shape
        )

    def graph_module(self) -> fx.GraphModule:
        """The program as a module of its flat inputs, in the form that ``torch.compile`` likes.

        Tensors are read by ``get_attr`` from ``tensors``; the output is a flat tuple.
        """
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            name = info(node).tensor if node.op == "placeholder" else None
            if name is None:
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
                continue
            new = graph.create_node("get_attr", f"tensors.{self.paths[name]}", name=node.name)
            new.meta = dict(node.meta)
            mapping[node] = new
        root = torch.nn.Module()
        root.tensors = self.tensors
        module = fx.GraphModule(root, graph, self.name)
        # GraphModule copies the attributes that the graph reads into modules of its own; the
        # live ones take their place, so that a replaced buffer is not missed.
        module._modules["tensors"] = self.tensors
        return module

    def places(self) -> list[tuple[torch.nn.Module, str]]:
        """Owner and attribute of each tensor, in the order of the program's placeholders."""
        found = []
        for name in self._program.tensor_nodes:
            owner, _, attribute = self.paths[name].rpartition(".")
            found.append((self.tensors.get_submodule(owner), attribute))
        return found


@runtime_checkable
class Backend(Protocol):
    """Turns a program into something callable.

    A backend is a frozen dataclass of its options. Packages add theirs by an entry point of the
    group ``torchlathe.backends`` that names the class.
    """

    @property
    def name(self) -> str:
        """Name in ``backend="..."`` and in reports."""
        ...

    def lower(self, source: Lowerable) -> FlatCallable:
        """Return a function of the program's flat inputs that gives its flat outputs.

        Raises:
            BackendError: The program cannot be lowered.
        """
        ...


def backend_names() -> list[str]:
    """Names of all backends: the built-in ones and those of entry points."""
    return sorted({*_TABLE, *(point.name for point in _points())})


def get_backend(backend: str | Backend | type[Any]) -> Backend:
    """Find a backend.

    Args:
        backend: A name, an instance such as ``Inductor(mode="max-autotune")``, or a class.

    Raises:
        BackendError: No backend has this name, or what was given is none.
    """
    if isinstance(backend, str):
        return _by_name(backend)()
    made = backend() if isinstance(backend, type) else backend
    if isinstance(made, Backend) and callable(made.lower):
        return made
    raise BackendError(
        f"{backend!r} is not a backend",
        hint=f"give one of {', '.join(backend_names())}, or an object with `name` and `lower`",
    )


def _points() -> metadata.EntryPoints:
    return metadata.entry_points(group=ENTRY_POINTS)


def _by_name(name: str) -> Callable[[], Backend]:
    points = [point for point in _points() if point.name == name]
    if name in _TABLE and not points:
        module, _, attribute = _TABLE[name].partition(":")
        found: Callable[[], Backend] = getattr(import_module(module), attribute)
        return found
    if not points:
        near = difflib.get_close_matches(name, backend_names(), cutoff=0.5)
        also = f"; did you mean {' or '.join(near)}?" if near else ""
        raise BackendError(
            f"no backend is called {name!r}{also}", hint=f"there are {', '.join(backend_names())}"
        )
    if len(points) > 1 or name in _TABLE:
        values = [*([_TABLE[name]] if name in _TABLE else []), *(p.value for p in points)]
        raise BackendError(f"several backends are called {name!r}: {', '.join(values)}")
    try:
        loaded: Callable[[], Backend] = points[0].load()
    except Exception as error:
        raise BackendError(
            f"backend {name!r} ({points[0].value}) could not be loaded: {error}",
            hint="is the package that provides it installed as a whole?",
        ) from error
    return loaded
