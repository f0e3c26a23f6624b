"""A program as text: the same program gives the same text, on every machine and in every process.

Made for goldens, dumps between passes and diffs, so it has no object ids, no file paths and no
names that depend on what was traced before.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from torchlathe.ir.extents import canonical_symbols, expression, symbol_names
from torchlathe.ir.inputs import input_paths
from torchlathe.ir.program import TensorKind
from torchlathe.ir.provenance import info, module_path

if TYPE_CHECKING:
    from torchlathe.ir.program import Program, TensorEntry

__all__ = ["dtype_text", "program_text"]

_WORD = re.compile(r"\b\w+\b")
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype: ``f32``; rare ones have the name that torch gives them."""
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def program_text(program: Program, axis_terms: bool = False) -> str:
    """The program as text.

    Args:
        program: What to print.
        axis_terms: Append the term of each axis, ``{a3, a7*a8}``, to every tensor.
    """
    return "\n".join(_Printer(program, axis_terms).lines()) + "\n"


class _Printer:
    """Names and terms of one program."""

    def __init__(self, program: Program, axis_terms: bool) -> None:
        self.program = program
        names = symbol_names(program)
        self._symbols = canonical_symbols(names)
        self._names = {symbol.name: name for symbol, name in names.items()}
        self._terms = _terms_reader(program) if axis_terms else None
        self._references = {
            node: f"${info(node).tensor}" if info(node).tensor else f"%{node.name}"
            for node in program.graph.nodes
        }

    def lines(self) -> Iterator[str]:
        """The whole text, line by line."""
        program = self.program
        yield f"program {program.model_name}"
        yield from self._tensors()
        yield "inputs:"
        for path, node in zip(input_paths(program), program.input_nodes, strict=True):
            note = "" if path == node.name else f"  # {path}"
            yield f"  %{node.name} : {self._value(node) or None}{note}"
        yield "ops:"
        for node in program.nodes:
            if node.op not in ("placeholder", "output"):
                yield f"  {self._call(node)}"
        yield "outputs:"
        leaves = [self._argument(item) for item in _flat_outputs(program)]
        yield f"  {_structure(program.out_spec, iter(leaves))}"

    def _tensors(self) -> Iterator[str]:
        program = self.program
        yield "tensors:"
        for name, node in program.tensor_nodes.items():
            yield f"  ${name} : {_kind(program.entries[name])} {self._value(node)}"
        for alias, name in sorted(program.aliases.items()):
            yield f"  ${alias} = ${name}"
        for name, entry in program.carried.items():
            text = self._tensor(entry.tensor)
            yield f"  ${name} : {_kind(entry)} {text}  # not read, carried along"

    def _call(self, node: fx.Node) -> str:
        arguments = [self._argument(a) for a in node.args]
        arguments += [f"{k}={self._argument(v)}" for k, v in node.kwargs.items()]
        text = f"%{node.name} = {_target(node)}({', '.join(arguments)})"
        if value := self._value(node):
            text += f" : {value}"
        notes = []
        if path := module_path(node):
            notes.append(f"in {path}")
        if by := info(node).created_by:
            notes.append(f"by {by}")
        return f"{text}  # {' '.join(notes)}" if notes else text

    # -- values ----------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> str:
        text = self._metadata(node.meta.get("val"))
        if self._terms is not None and (terms := self._terms(node)):
            # Extents in terms have the names of the shape environment.
            text += " " + _WORD.sub(lambda m: self._names.get(m[0], m[0]), terms)
        return text

    def _metadata(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return f"({', '.join(map(self._metadata, value))})"
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            kind = {torch.SymInt: "int", torch.SymFloat: "float"}.get(type(value), "bool")
            return f"{kind} {self._number(value)}"
        return "" if value is None else self._argument(value)

    def _tensor(self, value: torch.Tensor) -> str:
        text = f"{dtype_text(value.dtype)}[{', '.join(map(self._number, value.shape))}]"
        return text if value.device.type in ("cpu", "meta") else f"{text}@{value.device}"

    def _number(self, value: Any) -> str:
        found = expression(value)
        if isinstance(found, int | float):
            return repr(found)
        return str(found.xreplace(self._symbols))

    def _argument(self, item: Any) -> str:
        match item:
            case fx.Node():
                return self._references[item]
            case list():
                return f"[{', '.join(map(self._argument, item))}]"
            case tuple():
                return f"({', '.join(map(self._argument, item))}{',' * (len(item) == 1)})"
            case dict():
                return "{" + ", ".join(f"{k}: {self._argument(v)}" for k, v in item.items()) + "}"
            case slice():
                parts = (item.start, item.stop, item.step)
                return ":".join("" if p is None else self._argument(p) for p in parts)
            case torch.dtype():
                return dtype_text(item)
            case torch.memory_format() | torch.layout():
                return str(item).removeprefix("torch.")
            case torch.SymInt() | torch.SymFloat() | torch.SymBool():
                return self._number(item)
            case torch.device():
                return str(item)
            case None | bool() | int() | float() | complex() | str() | bytes():
                return repr(item)
        # The repr of anything else may hold its address.
        return f"<{type(item).__name__}>"


def _terms_reader(program: Program) -> Callable[[fx.Node], str]:
    from torchlathe.ir.axes import AxisTerms

    result = program.analysis(AxisTerms)

    def read(node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return _braced(result.terms(node))
        if isinstance(value, list | tuple):
            parts = (
                _braced(result.terms_of(node, index))
                for index, item in enumerate(value)
                if isinstance(item, torch.Tensor)
            )
            return " ".join(parts)
        return ""

    return read


def _braced(terms: Sequence[object]) -> str:
    return "{" + ", ".join(map(str, terms)) + "}"


def _kind(entry: TensorEntry) -> str:
    transient = entry.kind is TensorKind.BUFFER and not entry.persistent
    return "non-persistent buffer" if transient else entry.kind.value


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return f"{node.op} {target}"
    if isinstance(target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(target)
    name = getattr(target, "__qualname__", None) or type(target).__name__
    module = str(getattr(target, "__module__", "") or "").removeprefix("_")
    return f"{module}.{name}" if module else name


# -- outputs ---------------------------------------------------------------------------------


def _flat_outputs(program: Program) -> tuple[Any, ...]:
    outputs = program.output_node.args[0]
    assert isinstance(outputs, tuple)
    return outputs


def _structure(spec: pytree.TreeSpec, leaves: Iterator[str]) -> str:
    """Write a pytree as a Python expression; types keep their names, contexts give field names."""
    if spec.is_leaf():
        return next(leaves)
    children = [_structure(child, leaves) for child in spec.children()]
    context = spec.context
    if spec.type is list:
        return f"[{', '.join(children)}]"
    if spec.type is tuple:
        return f"({', '.join(children)}{',' * (len(children) == 1)})"
    if spec.type is dict:
        pairs = zip(context, children, strict=True)
        return "{" + ", ".join(f"{key!r}: {child}" for key, child in pairs) + "}"
    names = _field_names(context, len(children))
    if names:
        children = [f"{name}={child}" for name, child in zip(names, children, strict=True)]
    kind = context if isinstance(context, type) else spec.type
    return f"{getattr(kind, '__name__', 'object')}({', '.join(children)})"


def _field_names(context: Any, count: int) -> list[str]:
    """Look for the names of the children in what the type's flattening kept."""
    if isinstance(context, type):
        if dataclasses.is_dataclass(context):
            context = [field.name for field in dataclasses.fields(context)]
        else:
            context = list(getattr(context, "_fields", ()))
    if not isinstance(context, list | tuple):
        return []
    if len(context) == count and all(isinstance(name, str) for name in context):
        return list(context)
    return next(filter(None, (_field_names(part, count) for part in context)), [])
