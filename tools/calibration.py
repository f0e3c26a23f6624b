"""Calibration data and losses that a command line names: files of tensors, and functions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.export import ExportedProgram

from torchlathe.ir import Error, InputError, Program
from torchlathe.tools.models import NamedModel, load_object

__all__ = ["LOSSES", "Batches", "check_calibration", "load_calibration", "load_loss"]

FORMS = """name calibration data as one of
    data.safetensors or data.npz, whose tensors have one row per sample
    package.module:function or path/to/file.py:function, which returns an iterable of batches"""
LOSS_FORMS = """name a loss as one of
    cross-entropy or mse, against the labels that come with the batches
    package.module:function or path/to/file.py:function, which takes (outputs, batch)"""

_LABELS = ("labels", "label", "targets", "target", "y")
_NUMBERED = re.compile(r"(?:arr_)?(\d+)")
_PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"})

Loss = Callable[[Any, Any], torch.Tensor]
Rows = Callable[[str, int, int], torch.Tensor]


def check_calibration(name: str) -> None:
    """Refuse a name that cannot be right, before a model is loaded.

    Raises:
        InputError: There is no such file, or it is of a kind that is not read.
    """
    path = Path(name)
    if path.suffix in (".safetensors", ".npz"):
        if not path.is_file():
            raise InputError(
                f"there is no file {name}", hint="the path is relative to where you are"
            )
    elif path.suffix in _PICKLES:
        raise InputError(
            f"{name} is not read: a pickle can run any code while it is loaded",
            hint="save the tensors with safetensors.torch.save_file, or numpy.savez",
        )
    elif ":" not in name:
        hint = f"write {name}:function" if path.suffix == ".py" else FORMS
        raise InputError(f"{name} is not calibration data", hint=hint)


def load_calibration(name: str, model: NamedModel, batch_size: int | None = None) -> Iterable[Any]:
    """Batches for a model; they can be iterated any number of times.

    Args:
        name: See `FORMS`.
        model: Whose inputs the tensors of a file are.
        batch_size: Rows of a file in a batch; by default as many as the example inputs have.

    Raises:
        InputError: There is no such data, or it does not fit the model's inputs.
    """
    check_calibration(name)
    if Path(name).suffix not in (".safetensors", ".npz"):
        if batch_size is not None:
            raise InputError(
                f"{name} makes its own batches",
                hint="the size of batches can be chosen for files of tensors",
            )
        return _from_python(name)
    lengths, rows = (_open_npz if name.endswith(".npz") else _open_safetensors)(name)
    return _batches(name, lengths, rows, _Inputs.of(model), batch_size)


# -- functions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Again:
    """A generator, called anew for each iteration."""

    name: str
    function: Callable[[], Any]

    def __iter__(self) -> Iterator[Any]:
        found = _called(self.name, self.function)
        while True:
            try:
                batch = next(found)
            except StopIteration:
                return
            except Exception as error:
                raise _failed(self.name, error) from error
            yield batch


def _from_python(name: str) -> Iterable[Any]:
    target = load_object(name, FORMS)
    made = _called(name, target) if callable(target) else target
    if isinstance(made, Iterator):
        found: Iterable[Any] = _Again(name, target) if callable(target) else list(made)
    elif isinstance(made, Iterable) and not isinstance(made, str | torch.Tensor):
        found = made
    else:
        raise InputError(f"{name} gave {type(made).__name__}, not batches", hint=FORMS)
    if next(iter(found), None) is None:
        raise InputError(f"{name} gave no batch", hint="return a list of batches, or yield them")
    return found


def _called(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Error:
        raise
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> Error:
    if isinstance(error, Error):
        return error
    return InputError(f"{name} failed: {type(error).__name__}: {error}")


# -- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """Example inputs: keywords, or positional ones with the names that they have in forward."""

    tensors: Mapping[str, Any]
    keywords: bool

    @classmethod
    def of(cls, model: NamedModel) -> _Inputs:
        args: Any = model.args
        kwargs: Mapping[str, Any] = model.kwargs
        if isinstance(model.model, Program | ExportedProgram) and model.model.example_inputs:
            args, kwargs = model.model.example_inputs
        if isinstance(args, Mapping):
            args, kwargs = (), args
        args = args if isinstance(args, tuple | list) else (args,)
        if args and kwargs:
            raise InputError(
                "a file of tensors cannot hold positional and keyword inputs at once",
                hint="name a function that makes the batches",
            )
        if kwargs:
            return cls(kwargs, True)
        known = _positional(model.model)[: len(args)]
        names = [*known, *(str(i) for i in range(len(known), len(args)))]
        return cls(dict(zip(names, args, strict=True)), False)


def _positional(model: torch.nn.Module | Program | ExportedProgram) -> list[str]:
    """Names of positional inputs, as forward has them or had them when it was captured."""
    if isinstance(model, Program):
        return [node.name for node in model.input_nodes]
    if isinstance(model, ExportedProgram):
        return [str(name) for name in model.graph_signature.user_inputs]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in kinds]


@dataclass(frozen=True)
class Batches:
    """Rows of the tensors of a file, so many at a time.

    A last batch of fewer rows is left out, unless it is the only one.

    Attributes:
        rows: Gives the rows of a tensor between two indices.
        count: Number of rows.
        size: Rows in a batch.
        order: Names of the tensors, inputs first; as they follow in a positional batch.
        keywords: Whether a batch is a mapping.
        dtypes: To convert to, by name.
    """

    rows: Rows
    count: int
    size: int
    order: tuple[str, ...]
    keywords: bool
    dtypes: Mapping[str, torch.dtype]

    def __len__(self) -> int:
        return self.count // self.size

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        tensors = [self._part(name, number * self.size) for name in self.order]
        return dict(zip(self.order, tensors, strict=True)) if self.keywords else tuple(tensors)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def _part(self, name: str, start: int) -> torch.Tensor:
        part = self.rows(name, start, min(start + self.size, self.count))
        return part.to(self.dtypes.get(name, part.dtype))


def _batches(
    name: str, lengths: Mapping[str, int], rows: Rows, inputs: _Inputs, size: int | None
) -> Batches:
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        given = ", ".join(f"{n}: {count}" for n, count in lengths.items()) or "no tensors"
        raise InputError(
            f"{name} needs tensors with equally many rows, one per sample, and has {given}"
        )
    order = _order(name, list(lengths), inputs)
    examples = [x for x in inputs.tensors.values() if isinstance(x, torch.Tensor)]
    if size is None:
        size = next((int(x.shape[0]) for x in examples if x.dim()), 1)
    dtypes = {
        tensor: example.dtype
        for tensor, example in zip(order, inputs.tensors.values(), strict=False)
        if isinstance(example, torch.Tensor)
    }
    for tensor, wanted in dtypes.items():
        dtype = rows(tensor, 0, 1).dtype
        if dtype.is_floating_point != wanted.is_floating_point:
            raise InputError(f"{tensor} of {name} is {dtype}, and the model takes {wanted}")
    count = next(iter(lengths.values()))
    return Batches(rows, count, min(size, count), tuple(order), inputs.keywords, dtypes)


def _order(name: str, found: Sequence[str], inputs: _Inputs) -> list[str]:
    """Names of the tensors: the model's inputs in their order, then the others."""
    wanted = list(inputs.tensors)
    if set(wanted) <= set(found):
        return [*wanted, *sorted(set(found) - set(wanted))]
    if not inputs.keywords:
        numbers = {n: match for n in found if (match := _NUMBERED.fullmatch(n))}
        if len(numbers) == len(found) >= len(wanted):
            return sorted(found, key=lambda n: int(numbers[n][1]))
        if len(found) == len(wanted) == 1:
            return list(found)
    raise InputError(
        f"{name} has {', '.join(sorted(found))}, but the model takes {', '.join(wanted)}",
        hint="name the tensors after the inputs of the model"
        + ("" if inputs.keywords else ", or by their positions: 0, 1"),
    )


def _open_safetensors(name: str) -> tuple[dict[str, int], Rows]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(name, "pt")
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        lengths = {key: (part.get_shape() or [0])[0] for key, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name} cannot be read as safetensors: {error}") from error
    # Only the rows of a batch are ever in memory.
    return lengths, lambda key, start, stop: slices[key][start:stop]


def _open_npz(name: str) -> tuple[dict[str, int], Rows]:
    import zipfile

    import numpy

    try:
        with numpy.load(name, allow_pickle=False) as file:
            tensors = {key: torch.from_numpy(file[key]) for key in file.files}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{name} cannot be read as an archive of numpy: {error}",
            hint="write it with numpy.savez, of arrays of numbers",
        ) from error
    lengths = {key: len(x) if x.dim() else 0 for key, x in tensors.items()}
    return lengths, lambda key, start, stop: tensors[key][start:stop]


# -- losses ----------------------------------------------------------------------------------------


def load_loss(name: str) -> Loss:
    """A loss: one of `LOSSES`, or a function.

    Raises:
        InputError: There is no such function.
    """
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise InputError(f"there is no loss {name}", hint=LOSS_FORMS)
    target: Any = load_object(name, LOSS_FORMS)
    if not callable(target):
        raise InputError(f"{name} is {type(target).__name__}, not a function", hint=LOSS_FORMS)
    loss: Loss = target
    return loss


def _cross_entropy(outputs: Any, batch: Any) -> torch.Tensor:
    logits, labels = _result(outputs), _labels(batch)
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"cross-entropy of outputs {tuple(logits.shape)} with labels {tuple(labels.shape)}",
            hint="labels are class numbers, one for each row of the outputs",
        )
    labels = labels.to(logits.device, torch.int64)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def _mse(outputs: Any, batch: Any) -> torch.Tensor:
    result, labels = _result(outputs), _labels(batch)
    if result.shape != labels.shape:
        raise InputError(
            f"mean squared error of outputs {tuple(result.shape)} and {tuple(labels.shape)}",
            hint="the labels need the shape of the outputs",
        )
    return F.mse_loss(result, labels.to(result))


LOSSES: dict[str, Loss] = {"cross-entropy": _cross_entropy, "mse": _mse}


def _result(outputs: Any) -> torch.Tensor:
    """The first tensor of the outputs, or their logits."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", None) if logits is None else logits
    first = outputs if logits is None else logits
    while isinstance(first, tuple | list) and first:
        first = first[0]
    if not isinstance(first, torch.Tensor):
        raise InputError(f"no tensor to compute a loss from in {type(outputs).__name__}")
    return first


def _labels(batch: Any) -> torch.Tensor:
    """What a mapping calls its labels, or the last of a sequence."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    else:
        found = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(found, torch.Tensor):
        raise InputError(
            "the batches hold no labels to compute the loss with",
            hint=f"keyword batches call them {_LABELS[0]}; positional ones have them last",
        )
    return found
