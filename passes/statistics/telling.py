"""Functions as text, so that the states of runs with other functions are told apart."""

from __future__ import annotations

import hashlib
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from torchlathe.passes.statistics.saving import batch_digest

__all__ = ["callable_text"]

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch._ops.OpOverload, torch._ops.OpOverloadPacket, fx.Node),
)
_OF_MODULES = frozenset(vars(nn.Module()))


def callable_text(function: Any) -> str:
    """What a function is called and a hash of what it is made of, the same in each process.

    Its code counts, its defaults and what a `functools.partial` adds, the values of its closure,
    and of its own Python module the functions, numbers, texts and tensors that it reads. Of an
    object that is called, or whose method is, the code of its class and its attributes count, and
    of an ``nn.Module`` parameters, buffers and children. Of other values their class alone does:
    their text may be another one in each process.
    """
    if function is None:
        return "none"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} {hashlib.sha256(_Telling().of(function).encode()).hexdigest()[:16]}"


class _Telling:
    """Texts of values, each object once."""

    def __init__(self) -> None:
        # The objects are kept, for another one could get the id of one that is gone.
        self._seen: dict[int, tuple[int, Any]] = {}

    def of(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, torch.Tensor | np.ndarray):
            return _array_text(value)
        if isinstance(value, type):
            return f"{_module_name(value)}.{value.__qualname__}"
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, tuple | frozenset):  # equal ones may or may not be one object
            return self._compound(value)
        return self._once(value, self._compound)

    def _once(self, value: Any, tell: Callable[[Any], str]) -> str:
        if id(value) in self._seen:
            return f"#{self._seen[id(value)][0]}"
        self._seen[id(value)] = len(self._seen), value
        return tell(value)

    def _compound(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self.of, value))}]"
        if isinstance(value, set | frozenset):
            # The order of a set is another one in each process.
            return f"{{{', '.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, Mapping):
            return self._named(value.items())
        if callable(value):
            return self._called(value)
        if is_dataclass(value):
            return self._settings(value, ((f.name, getattr(value, f.name)) for f in fields(value)))
        if isinstance(value, Namespace | SimpleNamespace):
            return self._settings(value, sorted(vars(value).items()))
        node = getattr(value, "node", None)
        return f"{type(value).__qualname__} {node if isinstance(node, fx.Node) else ''}"

    def _named(self, items: Iterable[tuple[Any, Any]]) -> str:
        return f"{{{', '.join(f'{self.of(k)}: {self.of(v)}' for k, v in items)}}}"

    def _settings(self, value: Any, items: Iterable[tuple[str, Any]]) -> str:
        """An object that is a list of options: those that are numbers and texts."""
        plain = [(name, given) for name, given in items if isinstance(given, _PLAIN)]
        return f"{type(value).__qualname__} {self._named(plain)}"

    def _called(self, value: Any) -> str:
        # What torch.compile adds changes as it compiles.
        value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, partial):
            given = self._named(sorted(value.keywords.items()))
            return f"{self.of(value.func)} {self.of(value.args)} {given}"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return f"{self.of(value.__func__)} of {self._once(value.__self__, self._object)}"
        if isinstance(value, BuiltinFunctionType | type):
            return f"{value.__module__}.{value.__qualname__}"
        return self._object(value)

    def _function(self, function: FunctionType) -> str:
        code, own = function.__code__, function.__globals__
        closed = zip(code.co_freevars, function.__closure__ or (), strict=True)
        read = [
            (name, own[name])
            for name in _names(code)
            if name in own and self._counts(own[name], function)
        ]
        parts = (
            f"{_module_name(function)}.{function.__qualname__}",
            _code_text(code),
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            self._named((name, _content(cell)) for name, cell in closed),
            self._named(read),
        )
        return "|".join(parts)

    @staticmethod
    def _counts(value: Any, function: FunctionType) -> bool:
        """Whether a global value is told: functions of other Python modules are not."""
        if isinstance(value, FunctionType):
            return value.__module__ == function.__module__
        return isinstance(value, (*_PLAIN, torch.Tensor, np.ndarray))

    def _object(self, value: Any) -> str:
        """Class, code and attributes of an object whose methods are called."""
        if isinstance(value, type | ModuleType):
            return self.of(value)
        kind = type(value)
        parts = [f"{_module_name(kind)}.{kind.__qualname__}"]
        for each in kind.__mro__:
            if each.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
                continue
            methods = {k: v for k, v in vars(each).items() if isinstance(v, FunctionType)}
            parts += [f"{name} {_code_text(m.__code__)}" for name, m in sorted(methods.items())]
        own = sorted(getattr(value, "__dict__", {}).items())
        if isinstance(value, nn.Module):
            own = [(name, given) for name, given in own if name not in _OF_MODULES]
            own += [*value.named_parameters(recurse=False), *value.named_buffers(recurse=False)]
            own += value.named_children()
        return f"{' '.join(parts)} {self._named(own)}"


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _module_name(value: Any) -> str:
    """The Python module, also where ``python -m`` runs it under another name."""
    name = str(value.__module__)
    spec = getattr(sys.modules.get(name), "__spec__", None) if name == "__main__" else None
    return name if spec is None else str(spec.name)


def _array_text(value: torch.Tensor | np.ndarray[Any, Any]) -> str:
    try:
        return batch_digest("", value)
    except (RuntimeError, TypeError):  # no dense values in memory: sparse ones, meta tensors
        return f"{value.dtype} {tuple(value.shape)}"


def _names(code: CodeType) -> list[str]:
    """Global names and attributes that code reads, those of functions inside as well."""
    inside = [name for c in code.co_consts if isinstance(c, CodeType) for name in _names(c)]
    return list(dict.fromkeys([*code.co_names, *inside]))


def _code_text(code: CodeType) -> str:
    """Instructions, names and constants, those of functions inside as well."""
    constants = [
        _code_text(c)
        if isinstance(c, CodeType)
        # The order of a set is another one in each process.
        else repr(sorted(map(repr, c)) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return f"{code.co_code!r}{code.co_names}{constants}"
