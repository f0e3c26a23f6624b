"""What a name stands for, as something to call: a module, a saved model, or a runtime's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import ArtifactError, InputError, Program
from torchlathe.tools.models import NamedModel, load_model

__all__ = ["Contestant", "contestant", "inputs_of", "split_name"]

_FORMS = "name a module (file.py:function), .tl, .pt2, .onnx or .xml; NAME@BACKEND lowers it"


@dataclass(frozen=True)
class Contestant:
    """Something that is measured.

    Attributes:
        name: As it was named, with its backend.
        run: Called with the arguments of the first contestant.
        bytes: Of the file, or of parameters and buffers.
        parameters: How many numbers, if that is known.
    """

    name: str
    run: Callable[..., Any]
    bytes: int
    parameters: int | None = None


def split_name(name: str) -> tuple[str, str | None]:
    """The model and the backend of ``model@backend``; a model's own code if there is none."""
    model, at, backend = name.rpartition("@")
    return (model, backend) if at and model and "/" not in backend else (name, None)


def inputs_of(name: str, inputs: str | None, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs of a named model.

    Raises:
        InputError: There are none.
    """
    from torchlathe.tools.input_specs import parse_inputs

    if inputs is not None:
        given = parse_inputs(inputs, seed=seed)
        return given.args, given.kwargs
    model, _ = split_name(name)
    if Path(model).suffix in (".onnx", ".xml"):
        raise InputError(f"{model} has no inputs of its own", hint="give --inputs")
    named = load_model(model, seed=seed)
    if isinstance(named.model, Program):
        return named.model.example_inputs
    args = named.args
    if isinstance(named.model, torch.export.ExportedProgram):
        return named.model.example_inputs or ((), {})
    if isinstance(args, torch.Tensor):
        args = (args,)
    if isinstance(args, Mapping):
        return (), {**args, **named.kwargs}
    if not args and not named.kwargs:
        raise InputError(f"{model} comes without example inputs", hint="give --inputs")
    return tuple(args), dict(named.kwargs)


def contestant(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], *, dynamic: bool, seed: int
) -> Contestant:
    """Load what a name stands for, and lower it if the name has a backend.

    Raises:
        InputError: There is no such model.
        BackendError: The backend cannot lower it.
        ArtifactError: A file that cannot be loaded.
    """
    model, backend = split_name(name)
    path = Path(model)
    if path.suffix == ".onnx":
        return _onnx(name, path)
    if path.suffix == ".xml":
        return _openvino(name, path)
    if path.suffix == ".pt2" and backend is None and _is_package(path):
        return _package(name, path)
    named = load_model(model, seed=seed)
    if backend is None and isinstance(named.model, torch.nn.Module):
        return Contestant(name, named.model.eval(), _bytes(named.model), _count(named.model))
    return _lowered(name, named, backend or "eager", args, kwargs, dynamic)


def _lowered(
    name: str, named: NamedModel, backend: str, args: Any, kwargs: Any, dynamic: bool
) -> Contestant:
    from torchlathe.backends import CompiledModel
    from torchlathe.ir import capture

    if isinstance(named.model, Program):
        program = named.model
    else:
        program = capture(
            named.model, tuple(args), dict(kwargs), dynamic_shapes="auto" if dynamic else None
        )
    source = named.model if isinstance(named.model, torch.nn.Module) else None
    compiled = CompiledModel(program, backend, source=source)
    path = Path(split_name(name)[0])
    size = path.stat().st_size if path.suffix == ".tl" else _bytes(compiled)
    return Contestant(name, compiled, size, _count(compiled))


def _count(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def _bytes(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# -- files of other runtimes ---------------------------------------------------------------------


def _flat(args: Any, kwargs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _onnx(name: str, path: Path) -> Contestant:
    import onnxruntime

    _need(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded: {str(error)[:300]}") from error
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> Any:
        given = _by_name(names, args, kwargs)
        found = session.run(None, {n: t.detach().contiguous().numpy() for n, t in given.items()})
        return tuple(torch.from_numpy(value) for value in found)

    data = path.with_name(f"{path.name}.data")
    size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
    return Contestant(name, run, size)


def _openvino(name: str, path: Path) -> Contestant:
    import openvino

    _need(path)
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", config)
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded: {str(error)[:300]}") from error
    request, count = compiled.create_infer_request(), len(compiled.outputs)

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = [t.detach().contiguous().numpy() for t in _flat(args, kwargs)]
        found = request.infer(arrays, share_inputs=True, share_outputs=True)
        return tuple(torch.tensor(found[i]) for i in range(count))

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return Contestant(name, run, size)


def _is_package(path: Path) -> bool:
    """Whether a .pt2 holds a compiled package rather than an exported program."""
    import zipfile

    _need(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return any("aotinductor" in member for member in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _package(name: str, path: Path) -> Contestant:
    try:
        package: Any = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise ArtifactError(f"{path} cannot be loaded: {str(error)[:300]}") from error

    def run(*args: Any, **kwargs: Any) -> Any:
        return package(*_flat(args, kwargs))

    return Contestant(name, run, path.stat().st_size)


def _by_name(names: list[str], args: Any, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Inputs by the names that a file has for them, or in its order where it has others."""
    if set(names) <= set(kwargs):
        return {name: kwargs[name] for name in names}
    return dict(zip(names, _flat(args, kwargs), strict=False))


def _need(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint=_FORMS)
