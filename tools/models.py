"""The model that a command line names: a Python function, a file, or a transformers folder."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from torchlathe.ir import ArtifactError, Error, InputError, Program, SpecError, capture
from torchlathe.tools.compat import define_torchvision_ops
from torchlathe.tools.input_specs import parse_inputs

__all__ = ["NamedModel", "load_model", "load_object"]

FORMS = """name a model as one of
    package.module:function or path/to/file.py:function, which returns a module, or
        (module, example_inputs), or (module, args, kwargs)
    model.pt2, saved by torch.export.save
    model.tl, saved by torchlathe
    a transformers folder, or a config.json"""


@dataclass(frozen=True)
class NamedModel:
    """A model with what is needed to capture it.

    Attributes:
        name: As it was named.
        model: What ``torchlathe.compile`` takes: a module, an exported program or a program.
        args: Example inputs; a tuple, a tensor or a dict, as ``torchlathe.compile`` takes them.
        kwargs: Example keyword inputs.
        dynamic_shapes: As ``torchlathe.compile`` takes them.
        notes: What a reader of results should know, such as that the weights are random.
    """

    name: str
    model: torch.nn.Module | ExportedProgram | Program
    args: Any = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    notes: tuple[str, ...] = ()

    def capture(self) -> Program:
        """The program; of a saved model, the one that it holds."""
        if isinstance(self.model, Program):
            return self.model
        return capture(self.model, self.args, self.kwargs, dynamic_shapes=self.dynamic_shapes)


def load_model(
    name: str,
    *,
    inputs: str | None = None,
    dynamic: Literal["auto", "none"] | None = None,
    seed: int = 0,
    meta: bool = False,
) -> NamedModel:
    """Load a model by its name on the command line.

    Args:
        name: See `FORMS`.
        inputs: Example inputs as `torchlathe.tools.input_specs.parse_inputs` reads them; instead
            of those that come with the model.
        dynamic: ``"auto"`` makes the batch dynamic, ``"none"`` nothing; by default the dimensions
            that ``inputs`` names, and batch and sequence of a transformers model.
        seed: Of random weights and inputs.
        meta: Make the model on the meta device: with shapes and without values or memory. One of
            a transformers config without weights is there in any case if it would take more than
            half of the machine's memory.

    Raises:
        InputError: There is no such model, or making it failed, or it is a file with values.
        SpecError: ``inputs`` cannot be read.
        ArtifactError: A file that cannot be loaded.
    """
    torch.manual_seed(seed)
    given = parse_inputs(inputs, seed=seed) if inputs is not None else None
    found = _on_meta(name) if meta else _loader(name)(name)
    if given is not None:
        if isinstance(found.model, ExportedProgram | Program):
            raise InputError(
                f"{name} is captured already, with inputs of its own",
                hint="leave --inputs out, or name the function that makes the module",
            )
        found = replace(
            found, args=given.args, kwargs=given.kwargs, dynamic_shapes=given.dynamic_shapes
        )
    if dynamic is not None:
        found = replace(found, dynamic_shapes="auto" if dynamic == "auto" else None)
    return found


def _on_meta(name: str) -> NamedModel:
    """The model with shapes only."""
    loader = _loader(name)
    if loader is _load_transformers:
        from torchlathe.tools.pretrained import load_pretrained

        return load_pretrained(name, meta=True)
    if loader is not _load_function:
        raise InputError(
            f"{name} holds values, and is not made on the meta device",
            hint="leave --meta out, or name the function or the config that makes the model",
        )
    with torch.device("meta"):
        found = loader(name)
    assert isinstance(found.model, torch.nn.Module | ExportedProgram)
    if isinstance(found.model, ExportedProgram):
        return found
    # What the function puts on a device by itself goes along.
    args, kwargs = pytree.tree_map_only(torch.Tensor, _to_meta, (found.args, found.kwargs))
    note = "the model was made on the meta device, without values"
    model = found.model.to("meta")
    return replace(found, model=model, args=args, kwargs=kwargs, notes=(*found.notes, note))


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def _loader(name: str) -> Callable[[str], NamedModel]:
    path = Path(name)
    if path.suffix == ".pt2":
        return _load_exported
    if path.suffix == ".tl":
        return _load_artifact
    if path.suffix == ".json" or path.is_dir():
        return _load_transformers
    if ":" in name:
        return _load_function
    if path.suffix == ".py" and path.exists():
        raise InputError(
            f"{name} is a file of Python code, but which function makes the model?",
            hint=f"write {name}:function",
        )
    raise InputError(f"there is no model {name} here, and none is downloaded", hint=FORMS)


# -- files -------------------------------------------------------------------------------------


def _load_exported(name: str) -> NamedModel:
    _need_file(name)
    try:
        return NamedModel(name, torch.export.load(name))
    except Exception as error:
        raise ArtifactError(
            f"{name} cannot be loaded as an exported program: {type(error).__name__}: {error}",
            hint="write it with torch.export.save, with the version of torch that reads it",
        ) from error


def _load_artifact(name: str) -> NamedModel:
    from torchlathe.backends import load

    _need_file(name)
    return NamedModel(name, load(name).program)


def _need_file(name: str) -> None:
    if not Path(name).is_file():
        raise InputError(f"there is no file {name}", hint=FORMS)


def _load_transformers(name: str) -> NamedModel:
    from torchlathe.tools.pretrained import load_pretrained

    return load_pretrained(name)


# -- functions ---------------------------------------------------------------------------------


def _load_function(name: str) -> NamedModel:
    target = load_object(name)
    if isinstance(target, torch.nn.Module):
        return NamedModel(name, target)
    if not callable(target):
        raise InputError(f"{name} is {type(target).__name__}, not a function", hint=FORMS)
    try:
        made = target()
    except Error:
        raise
    except Exception as error:
        raise InputError(
            f"{name} failed: {type(error).__name__}: {error}", where=_last_frame(error)
        ) from error
    return _named(name, made)


def load_object(name: str, forms: str = FORMS) -> Any:
    """What ``package.module:name`` or ``path/to/file.py:name`` names.

    Args:
        name: The place, a colon and the name, which may have dots.
        forms: What may be named, for the hint of an error.

    Raises:
        InputError: There is no such thing, or its module cannot be imported.
        SpecError: Nothing is named after the colon.
    """
    place, _, attribute = name.rpartition(":")
    target: Any = _import(place, forms)
    for part in attribute.split("."):
        target = _attribute(target, part, name, forms)
    return target


def _named(name: str, made: Any) -> NamedModel:
    """What a function returned, as a model."""
    parts = made if isinstance(made, tuple) else (made,)
    legal = 1 <= len(parts) <= 3 and isinstance(parts[0], torch.nn.Module | ExportedProgram)
    if not legal or (len(parts) == 3 and not isinstance(parts[2], dict)):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"{name} returned ({kinds})",
            hint="return a module, or (module, example_inputs), or (module, args, kwargs)",
        )
    args = parts[1] if len(parts) > 1 else ()
    kwargs = parts[2] if len(parts) > 2 else {}
    return NamedModel(name, parts[0], args, kwargs)


def _import(place: str, forms: str) -> ModuleType:
    """Import a dotted name, with the working folder on the path, or run a file."""
    define_torchvision_ops()  # what it imports may need them
    if place.endswith(".py"):
        return _run_file(Path(place))
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        missing = error.name or place
        if place == missing or place.startswith(missing + "."):
            raise InputError(f"there is no module {missing}", hint=forms) from error
        raise _import_failed(place, error) from error
    except Exception as error:
        raise _import_failed(place, error) from error


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="the path is relative to where you are")
    name = f"torchlathe_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be run as Python code")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and typing look a class' module up by its name; and its neighbours import.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(str(path), error) from error
    return module


def _import_failed(place: str, error: Exception) -> InputError:
    return InputError(
        f"{place} cannot be imported: {type(error).__name__}: {error}", where=_last_frame(error)
    )


def _attribute(owner: Any, part: str, name: str, forms: str) -> Any:
    if not part:
        raise SpecError(f"{name} names no function after the colon", hint=forms)
    try:
        return getattr(owner, part)
    except AttributeError:
        known = [n for n, v in vars(owner).items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(part, known, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:8])}"
        place = getattr(owner, "__name__", type(owner).__name__)
        place = place.removeprefix("torchlathe_model_")
        raise InputError(f"{place} has no {part}", hint=hint if known else None) from None


def _last_frame(error: Exception) -> str | None:
    """The deepest frame of the user's code, outside of this file and the import system."""
    frames = [
        f"{frame.filename}:{frame.lineno} ({frame.name})"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")
    ]
    return frames[-1] if frames else None
