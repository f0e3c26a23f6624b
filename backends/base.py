"""What a backend is, and how one is found by its name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module, metadata
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import fx

from torchlathe.backends.completing import complete
from torchlathe.ir import BackendError, OptionError, Program, SpecError, info
from torchlathe.ir.text.building import build, conform_fields, spec_of
from torchlathe.ir.text.options import options_of
from torchlathe.ir.text.syntax import parse

__all__ = [
    "ENTRY_POINTS",
    "Backend",
    "Capabilities",
    "Configured",
    "FlatCallable",
    "Lowerable",
    "Origin",
    "backend_names",
    "backend_text",
    "capabilities_of",
    "get_backend",
]

ENTRY_POINTS = "torchlathe.backends"

FlatCallable = Callable[..., Sequence[Any]]

_TABLE = {
    "aoti": "torchlathe.backends.aoti:AOTInductor",
    "auto": "torchlathe.backends.auto:Auto",
    "checkpoint": "torchlathe.backends.checkpoints:Checkpoint",
    "eager": "torchlathe.backends.eager:Eager",
    "executorch": "torchlathe.backends.executorch:ExecuTorch",
    "inductor": "torchlathe.backends.inductor:Inductor",
    "module": "torchlathe.backends.module:ModuleBackend",
    "onnx": "torchlathe.backends.onnx:Onnx",
    "openvino": "torchlathe.backends.openvino:OpenVino",
}


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do with a program; what it cannot is refused before any work.

    Attributes:
        dtypes: Floating dtypes that tensors and inputs may have; None: all of torch's.
        devices: Types of devices that it runs on; None: all of torch's.
        dynamic_shapes: Whether one lowering serves every size of a dynamic dimension.
        training: Whether gradients flow to parameters and inputs.
        live: Whether each call reads the compiled model's own tensors. A backend that keeps
            copies of the weights lowers again when they have changed.
        packages: What has to be installed, as it is imported.
        extra: The extra of torchlathe that installs it.
        checked: Whether the result is held against the eager program before it is handed out.
    """

    dtypes: tuple[torch.dtype, ...] | None = None
    devices: tuple[str, ...] | None = None
    dynamic_shapes: bool = True
    training: bool = False
    live: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    checked: bool = True


# Of a backend that says nothing about itself, as those of other packages may.
_UNSAID = Capabilities(training=True, live=True)


@dataclass(frozen=True)
class Configured:
    """A backend whose options are its fields: held to their types, and written as text."""

    name: ClassVar[str]

    @property
    def capabilities(self) -> Capabilities:
        """What it can do with these options."""
        return _UNSAID

    def __post_init__(self) -> None:
        """Hold the options to their types; a subclass that checks more calls this first.

        Raises:
            OptionError: A value is not of its option's type.
        """
        conform_fields(self)

    def spec(self) -> str:
        """The backend as text: its name, and the options that are not at their defaults."""
        return spec_of(self)

    def __str__(self) -> str:
        return self.spec()


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

    A backend is a frozen dataclass of its options, by custom a `Configured` one. It may have
    ``capabilities``, and ``prepare(program)``, which may edit the program before its tensors are
    placed. The function that it returns may have ``write(path)``, which ``compiled.export`` calls.
    Packages add theirs by an entry point of the group ``torchlathe.backends`` that names the class.
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
        backend: A name, with options as in ``"inductor{freezing=true}"``; an instance such as
            ``Inductor(freezing=True)``; or a class.

    Raises:
        BackendError: No backend has this name, or what was given is none.
        SpecError: The text cannot be read, or an option is not known.
        OptionError: A value is not of its option's type.
    """
    if isinstance(backend, str):
        return _from_text(backend)
    made = backend() if isinstance(backend, type) else backend
    if isinstance(made, Backend) and callable(made.lower):
        return made
    raise BackendError(
        f"{backend!r} is not a backend",
        hint=f"give one of {', '.join(backend_names())}, or an object with `name` and `lower`",
    )


def capabilities_of(backend: Backend) -> Capabilities:
    """What a backend says that it can do."""
    found = getattr(backend, "capabilities", _UNSAID)
    assert isinstance(found, Capabilities)
    return found


def backend_text(backend: Backend) -> str:
    """The backend as text, with the options that are not at their defaults."""
    return spec_of(backend) if _has_options(type(backend)) else backend.name


def _has_options(cls: type) -> bool:
    """Whether the options of a class can be read from text and written to it."""
    if not is_dataclass(cls):
        return False
    made: type = cls
    try:
        options_of(made)
    except OptionError:
        return False
    return True


def _from_text(text: str) -> Backend:
    parts = parse(text)
    if len(parts) != 1:
        raise SpecError(
            f"{text!r} names {len(parts) or 'no'} backends, expected one",
            hint='candidates go to "auto{candidates=[eager,inductor]}"',
        )
    cls = _by_name(parts[0].name.text)
    made: Backend = build(cls, text, parts[0]) if parts[0].options else cls()
    return made


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
