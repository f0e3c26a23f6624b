"""The model that a compilation gives: the calling convention and names of the original."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram

from torchlathe.backends.agreeing import Agreement
from torchlathe.backends.base import Backend, FlatCallable, Lowerable, Origin, get_backend
from torchlathe.backends.calling import Convention
from torchlathe.backends.completing import complete
from torchlathe.backends.lowering import lowered
from torchlathe.backends.module_tree import own_entries, refresh, tensor_tree, tie
from torchlathe.backends.moving import moved, places_after
from torchlathe.ir import InputError, Program, UnsupportedError
from torchlathe.ir.extents import expression, symbol_names
from torchlathe.ir.inputs import input_paths

__all__ = ["CompiledModel"]


@dataclass
class _State:
    """Everything that a CompiledModel has beside its tensors.

    It is one attribute, so that no name of a tensor or submodule can clash with it.
    """

    program: Program
    backend: Backend
    report: Any
    tensors: torch.nn.Module
    paths: dict[str, str]
    convention: Convention
    run: FlatCallable
    check: bool
    agreement: Agreement | None
    versions: tuple[int, ...] = ()


class CompiledModel(torch.nn.Module):
    """A program that is called, trained, moved and saved like the model that it came from.

    ``state_dict``, ``named_parameters`` and ``named_buffers`` have the names of the original,
    tied tensors are tied, and gradients flow. Nothing is shared with the original. Constants of
    the forward code are non-persistent buffers beside these.

    The graph was captured in eval mode: dropout and batch norm keep their eval behaviour, and
    ``train()`` changes nothing but the flag. ``.to(device)`` and ``.to(dtype)`` convert the whole
    graph, see `torchlathe.backends.moving`; converting a submodule alone is not noticed.

    Args:
        program: What to run. It is left as it is; its tensors are copied where ``source`` has
            them, and belong to this model otherwise.
        backend: A name, or an instance such as ``Inductor(mode="max-autotune")``.
        source: The module or exported program that the program was captured from. None: every
            tensor is copied.
        report: What the compilation did; anything with ``to_dict()``.
        check: Whether what the backend makes is held against the eager program on the example
            inputs.

    Raises:
        BackendError: An unknown backend, or one that cannot lower the program.
        DisagreementError: The backend made something that computes another function.
    """

    def __init__(
        self,
        program: Program,
        backend: str | Backend = "eager",
        *,
        source: torch.nn.Module | ExportedProgram | None = None,
        before: Program | None = None,
        report: Any = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        found = get_backend(backend)
        program = program.copy()
        own_entries(program, source)
        if (prepare := getattr(found, "prepare", None)) is not None:
            prepare(program)
        tensors, paths = tensor_tree(program)
        # One set of registries under two modules: the plain one has no attribute of its own that
        # a tensor's name could meet, so backends read from it.
        for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[table] = tensors.__dict__[table]
        lowerable = Lowerable(program, tensors, paths, _origin(source, before))
        run, agreement = lowered(found, lowerable, check=check)
        self.__dict__["_torchlathe"] = _State(
            program, found, report, tensors, paths, Convention(program), run, check, agreement
        )
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on arguments as the original takes them.

        Raises:
            InputError: Another structure, dtype or static extent than was captured.
        """
        state: _State = self.__dict__["_torchlathe"]
        flat = state.convention.flatten(args, kwargs)
        return state.convention.unflatten(state.run(*flat))

    # -- what it is ------------------------------------------------------------------------

    @property
    def program(self) -> Program:
        """The program with the tensors as they are now; edit a ``copy()`` of it."""
        state: _State = self.__dict__["_torchlathe"]
        complete(state.program)
        refresh(state.program, state.tensors, state.paths)
        versions = tuple(
            number
            for entry in state.program.entries.values()
            for number in (id(entry.tensor), _version(entry.tensor))
        )
        if state.versions and versions != state.versions:
            # Training wrote into the tensors, so what analyses found in them is stale.
            state.program.version += 1
        state.versions = versions
        return state.program

    @property
    def backend(self) -> Backend:
        """The backend that runs the program."""
        state: _State = self.__dict__["_torchlathe"]
        return state.backend

    @property
    def agreement(self) -> Agreement | None:
        """How well what the backend made agrees with the eager program; None if not compared."""
        state: _State = self.__dict__["_torchlathe"]
        return state.agreement

    @property
    def candidates(self) -> tuple[Any, ...]:
        """What ``backend="auto"`` found for each candidate; empty for another backend."""
        run = self.__dict__["_torchlathe"].run
        return tuple(getattr(run, "candidates", ()))

    @property
    def module(self) -> Any:
        """The smaller copy of the original module, of its own classes; see `ModuleBackend`.

        Its tensors are this model's own.

        Raises:
            UnsupportedError: Another backend than ``"module"`` runs the program.
        """
        state: _State = self.__dict__["_torchlathe"]
        found = getattr(state.run, "module", None)
        if not isinstance(found, torch.nn.Module):
            raise UnsupportedError(
                f"backend={state.backend.name!r} runs the graph, and makes no module",
                hint='compile with backend="module"',
            )
        return found

    @property
    def report(self) -> Any:
        """What the compilation did to the model."""
        return self.__dict__["_torchlathe"].report

    @report.setter
    def report(self, report: Any) -> None:
        self.__dict__["_torchlathe"].report = report

    @property
    def kept(self) -> dict[str, dict[int, torch.Tensor]]:
        """Per tensor and axis that lost indices, the original indices that stayed.

        Shapes:
            each: (kept,) int64, sorted. Tied names are all there. See `kept_indices` for the
            other tensors and axes.
        """
        state: _State = self.__dict__["_torchlathe"]
        program = state.program
        # Not those of constants, which are at another path, and of tensors that are gone.
        found = {n: dict(axes) for n, axes in program.kept.items() if state.paths.get(n) == n}
        aliases = {a: dict(found[n]) for a, n in program.aliases.items() if n in found}
        return found | aliases

    def kept_indices(self, name: str, axis: int) -> torch.Tensor:
        """Original indices of a tensor's axis that stayed, also where all did.

        Args:
            name: A name of ``state_dict()``.
            axis: May be negative.

        Raises:
            InputError: There is no such tensor or axis.
        """
        tensors = _named_tensors(self)
        if name not in tensors:
            raise InputError(f"the compiled model has no tensor {name!r}")
        tensor = tensors[name]
        if not -tensor.dim() <= axis < tensor.dim():
            raise InputError(f"{name} has {tensor.dim()} axes, there is no axis {axis}")
        axis %= tensor.dim()
        kept = self.kept.get(name, {}).get(axis)
        return torch.arange(tensor.shape[axis]) if kept is None else kept

    def zeroed_reference(self, model: torch.nn.Module) -> torch.nn.Module:
        """The full-size twin: a copy of the original with only the erased writes at zero.

        An exact erase equals it for every input. It is in eval mode, as what was captured is.

        Args:
            model: The module that was compiled. It is left as it is.

        Raises:
            InputError: This is not the module that was compiled, or it was changed since.
            UnsupportedError: A pass gave tensors other values than the module has.
        """
        program = self.program
        if program.rewritten:
            names = sorted(program.rewritten)
            raise UnsupportedError(
                f"passes gave new values to {', '.join(names[:4])}"
                + (f" and {len(names) - 4} more" if len(names) > 4 else "")
                + ", so that no copy of the original with zeros equals this model",
                hint="compile with these passes first, and erase from a capture of the result; "
                "then that result is the original",
            )
        own = _named_tensors(model)
        # Constants and what passes added were never tensors of the module.
        zeroed = {n: axes for n, axes in program.zeroed.items() if any(map(len, axes.values()))}
        for name in {**zeroed, **{n: None for n in program.kept if n in own}}:
            _check_original(program, name, own)
        twin = copy.deepcopy(model)
        tensors = _named_tensors(twin)
        with torch.no_grad():
            for name, axes in zeroed.items():
                for axis, indices in axes.items():
                    tensors[name].index_fill_(axis, indices.to(tensors[name].device), 0)
        return twin.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file; `torchlathe.load` reads it.

        Raises:
            ArtifactError: The file cannot be written, or something in the program has no place
                in a file.
        """
        from torchlathe.backends.artifact import save

        save(self, path)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write what the backend made, for a runtime that needs no torchlathe.

        That is a ``.pt2`` of ``aoti``, ``.onnx``, ``.pte`` of ``executorch``, ``.xml`` with a
        ``.bin`` beside it of ``openvino``, or a folder of ``checkpoint``.

        Raises:
            UnsupportedError: Another backend, which makes no file.
        """
        state: _State = self.__dict__["_torchlathe"]
        write = getattr(state.run, "write", None)
        if write is None:
            raise UnsupportedError(
                f"backend={state.backend.name!r} makes no file",
                hint="aoti, onnx, openvino, executorch and checkpoint do; compiled.save keeps "
                "every model",
            )
        write(path)

    # -- what nn.Module does ---------------------------------------------------------------

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> CompiledModel:
        state: _State = self.__dict__["_torchlathe"]
        program = self.program
        entries = (*program.entries.values(), *program.carried.values())
        places = places_after([entry.tensor for entry in entries], fn)
        # Before any tensor changes: what the graph cannot follow leaves the model as it was.
        after = moved(program, places) if places else program
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        tie(after, state.tensors, state.paths)
        refresh(after, state.tensors, state.paths)
        if places:
            state.program = after
            state.convention = Convention(after)
            again = Origin(getattr(state.run, "module", None), finished=True)
            lowerable = Lowerable(after, state.tensors, state.paths, again)
            state.run, state.agreement = lowered(state.backend, lowerable, check=state.check)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        state: _State = self.__dict__["_torchlathe"]
        twin = CompiledModel(
            self.program,
            state.backend,
            source=self,
            report=copy.deepcopy(state.report, memo),
            check=False,  # equal to this one, which was compared
        )
        twin.train(self.training)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a compiled model cannot be pickled",
            hint="compiled.save(path) and torchlathe.load(path) keep it whole; "
            "torch.save(compiled.state_dict(), path) keeps its tensors",
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Name, backend, size and inputs, on one line each."""
        state: _State = self.__dict__["_torchlathe"]
        ops = sum(1 for node in state.program.nodes if node.op == "call_function")
        parameters = sum(parameter.numel() for parameter in self.parameters())
        erased = len({n for n in self.kept if n not in state.program.aliases})
        lines = [
            f"{state.program.model_name}, backend={state.backend.name!r}",
            f"{parameters:,} parameters, {ops} ops, {erased} tensors erased in part",
            f"inputs: {_signature(state.program)}",
        ]
        return "\n  " + ",\n  ".join(lines) + "\n"


# -- details ---------------------------------------------------------------------------------


def _origin(source: torch.nn.Module | ExportedProgram | None, before: Program | None) -> Origin:
    if isinstance(source, CompiledModel):
        run = source.__dict__["_torchlathe"].run
        return Origin(getattr(run, "module", None), before)
    return Origin(source if isinstance(source, torch.nn.Module) else None, before)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _named_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _check_original(program: Program, name: str, own: dict[str, torch.Tensor]) -> None:
    """Hold a tensor of what should be the original against what was erased from it."""
    hint = "give the module that was compiled, as it was then"
    if name not in own:
        raise InputError(f"the module given has no tensor {name!r}", hint=hint)
    shape = tuple(own[name].shape)
    entry = program.entries.get(name)
    kept, zeroed = program.kept.get(name, {}), program.zeroed.get(name, {})
    if not shape and {*kept, *zeroed} == {0}:
        return  # a scalar, zeroed as a whole
    expected: list[int | None] = [None] * len(shape)
    if entry is not None and entry.tensor.dim() == len(shape):
        expected = list(entry.tensor.shape)
    for axis in {*kept, *zeroed}:
        if axis >= len(shape):
            raise InputError(f"{name} has {len(shape)} axes, the original had more", hint=hint)
        # Where another tensor was zeroed, erased indices of this one are on no record but this.
        expected[axis] = program.extents.get(name, {}).get(axis)
    if any(want is not None and want != got for want, got in zip(expected, shape, strict=True)):
        raise InputError(
            f"{name} has shape {shape}, the original had "
            f"({', '.join('?' if want is None else str(want) for want in expected)})",
            hint=hint,
        )


def _signature(program: Program) -> str:
    names, parts = symbol_names(program), []
    for path, node in zip(input_paths(program), program.input_nodes, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            exprs = (expression(extent) for extent in value.shape)
            extents = ", ".join(str(e if isinstance(e, int) else e.xreplace(names)) for e in exprs)
            parts.append(f"{path} {str(value.dtype).removeprefix('torch.')}[{extents}]")
        else:
            parts.append(f"{path}={value!r}")
    return ", ".join(parts)
