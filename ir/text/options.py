"""The options of a pass or a backend: typed dataclass fields, read from text and written back.

What a field's annotation can hold in text: ``bool``, ``int``, ``float``, ``str``, ``None``,
``Literal``, ``Enum``, ``tuple``, ``list``, ``dict`` and unions of these. Anything else (a
callable, a tensor) can be given in Python only.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from torchlathe.ir.errors import OptionError
from torchlathe.ir.text.syntax import DictSyntax, ListSyntax, Syntax, Word, quoted

__all__ = [
    "MismatchError",
    "Option",
    "conform",
    "did_you_mean",
    "expected",
    "options_of",
    "read",
    "text_of",
]

_INTEGER = re.compile(r"[+-]?[0-9]+")
_SEQUENCES = (tuple, list, Sequence)
_MAPPINGS = (dict, Mapping)


class MismatchError(Exception):
    """A value that is not of the type of its option.

    Args:
        wanted: The type in words.
        syntax: The part of the text that does not fit; None for a Python value.
        value: The Python value that does not fit.
    """

    def __init__(self, wanted: str, syntax: Syntax | None = None, value: object = None) -> None:
        super().__init__(wanted)
        self.wanted = wanted
        self.syntax = syntax
        self.value = value


@dataclass(frozen=True)
class Option:
    """One option of a pass or a backend, as its dataclass field declares it.

    Attributes:
        name: Name of the field.
        type: The annotation, resolved.
        default: The default value; ``dataclasses.MISSING`` if there is none.
        help: One line for the user, from the field's ``metadata["help"]``.
    """

    name: str
    type: Any
    default: Any
    help: str = ""

    @property
    def key(self) -> str:
        """The name in text pipelines."""
        return self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether the option must be given."""
        return self.default is dataclasses.MISSING

    @property
    def type_text(self) -> str:
        """The type in words."""
        return expected(self.type)

    @property
    def default_text(self) -> str:
        """The default as a text pipeline would have it; empty if the option is required."""
        return "" if self.required else text_of(self.default, self.type)


@functools.cache
def options_of(cls: Any) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields.

    Raises:
        OptionError: An annotation names something that its module does not have at run time.
    """
    return tuple(_option(cls, field) for field in dataclasses.fields(cls) if field.init)


def _option(cls: type, field: dataclasses.Field[Any]) -> Option:
    annotation = _annotation(cls, field)
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if _conforms(default, annotation):  # if it does not, making the pass will say so
        default = conform(default, annotation)
    return Option(field.name, annotation, default, str(field.metadata.get("help", "")))


def _annotation(cls: type, field: dataclasses.Field[Any]) -> Any:
    if not isinstance(field.type, str):
        return field.type
    owner = next(c for c in cls.__mro__ if field.name in vars(c).get("__annotations__", ()))
    try:
        return eval(field.type, vars(sys.modules[owner.__module__]), dict(vars(owner)))
    except Exception as error:
        raise OptionError(
            f"the annotation of {cls.__name__}.{field.name} cannot be resolved: {field.type}",
            where=owner.__module__,
            hint="import what it names at run time, not under TYPE_CHECKING",
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest of the known names, or all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {_either(near)}?"
    return f"known are {', '.join(names)}" if names else "there are none"


# -- types -------------------------------------------------------------------------------------


def _members(annotation: Any) -> list[Any]:
    """The types of a union, those that say most about a text first."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [m for part in get_args(annotation) for m in _members(part)]
    else:
        members = [annotation]
    return sorted(members, key=_rank)


def _rank(annotation: Any) -> int:
    order = (None, types.NoneType, bool, int, float)
    if annotation in order:
        return order.index(annotation)
    if annotation is str:
        return 7
    return 6 if not _is_textual(annotation) else 5


def _is_textual(annotation: Any) -> bool:
    """Whether a text pipeline can hold values of this type."""
    if annotation in (None, types.NoneType, bool, int, float, str) or _is_enum(annotation):
        return True
    arguments = [a for a in get_args(annotation) if a is not ...]
    origin = get_origin(annotation)
    if origin in _SEQUENCES or origin in _MAPPINGS:
        return bool(arguments) and all(any(map(_is_textual, _members(a))) for a in arguments)
    return origin is Literal


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _enum_text(member: enum.Enum) -> str:
    return member.name.lower().replace("_", "-")


def _item_types(annotation: Any, count: int) -> list[Any] | None:
    """The type of each item of a sequence type; None if it cannot have that many."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and arguments[-1:] != (...,):
        return list(arguments) if len(arguments) == count else None
    return [arguments[0]] * count


def expected(annotation: Any) -> str:
    """A type in words, for messages and help."""
    return _either([word for member in _members(annotation) for word in _words(member)])


def _words(annotation: Any) -> list[str]:
    """What a type allows, in words: one for most, one for each choice where there are some."""
    if get_origin(annotation) is Literal:
        return [text_of(choice, annotation) for choice in get_args(annotation)]
    if _is_enum(annotation):
        return [_enum_text(member) for member in annotation]
    return [_word_for(annotation)]


def _word_for(annotation: Any) -> str:
    simple = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    if isinstance(annotation, type) and annotation in simple:
        return simple[annotation]
    if annotation in (None, types.NoneType):
        return "none"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_textual(annotation) and origin in _MAPPINGS:
        return f"a mapping {{{expected(arguments[0])}: {expected(arguments[1])}}}"
    if _is_textual(annotation):
        inner = ", ".join("..." if a is ... else expected(a) for a in arguments)
        return f"a list [{inner}]" if origin is tuple else f"a list [{inner}, ...]"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"a {name} (from Python only)"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


# -- from text ---------------------------------------------------------------------------------


def read(syntax: Syntax, annotation: Any) -> Any:
    """The value of this type that a piece of text stands for.

    Raises:
        MismatchError: It stands for none.
    """
    nested: MismatchError | None = None
    for member in _members(annotation):
        try:
            return _read_one(syntax, member)
        except MismatchError as mismatch:
            # A list with one wrong item is a list: point at the item.
            if mismatch.syntax is not syntax:
                nested = mismatch
    raise nested or MismatchError(expected(annotation), syntax)


def _read_one(syntax: Syntax, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if isinstance(syntax, ListSyntax) and origin in _SEQUENCES and _is_textual(annotation):
        item_types = _item_types(annotation, len(syntax.items))
        if item_types is not None:
            items = map(read, syntax.items, item_types)
            return list(items) if origin is list else tuple(items)
    if isinstance(syntax, DictSyntax) and origin in _MAPPINGS and _is_textual(annotation):
        key_type, value_type = get_args(annotation)
        entries: dict[Any, Any] = {}
        for word, item in syntax.items:
            key = read(word, key_type)
            if key in entries:
                raise MismatchError("each key once", word)
            entries[key] = read(item, value_type)
        return entries
    if isinstance(syntax, Word):
        if annotation is str:
            return syntax.text
        found = _read_word(syntax, annotation)
        if found is not _NOTHING:
            return found
    raise MismatchError(expected(annotation), syntax)


_NOTHING = object()


def _read_word(word: Word, annotation: Any) -> Any:
    text = word.text
    if get_origin(annotation) is Literal:
        for choice in get_args(annotation):
            same = text if isinstance(choice, str) else _read_word(word, type(choice))
            if same == choice and type(same) is type(choice):
                return choice
    elif word.quoted:
        return _NOTHING
    elif annotation in (None, types.NoneType):
        return None if text == "none" else _NOTHING
    elif annotation is bool:
        return {"true": True, "false": False}.get(text, _NOTHING)
    elif annotation is int:
        return int(text) if _INTEGER.fullmatch(text) else _NOTHING
    elif annotation is float:
        try:
            return float(text)
        except ValueError:
            return _NOTHING
    elif _is_enum(annotation):
        wanted = text.lower().replace("_", "-")
        return next((m for m in annotation if _enum_text(m) == wanted), _NOTHING)
    return _NOTHING


# -- to text -----------------------------------------------------------------------------------


def text_of(value: Any, annotation: Any) -> str:
    """The text that reads back as this value of this type."""
    if value is None:
        return "none"
    if isinstance(value, enum.Enum):
        return _enum_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(float(value))  # without the class that NumPy's repr shows
    if isinstance(value, str):
        return _string_text(value, annotation)
    for member in _members(annotation):
        if _conforms(value, member) and _is_textual(member):
            return _container_text(value, member)
    return f"<{_python_name(value)}>"


def _container_text(value: Any, annotation: Any) -> str:
    if isinstance(value, Mapping):
        key_type, value_type = get_args(annotation)
        items = (f"{text_of(k, key_type)}:{_entry_text(v, value_type)}" for k, v in value.items())
        return "{" + ",".join(items) + "}"
    item_types = _item_types(annotation, len(value)) or []
    return "[" + ",".join(map(text_of, value, item_types)) + "]"


def _entry_text(value: Any, annotation: Any) -> str:
    """The value of an entry of a mapping, in which a bare colon would belong to the key."""
    text = text_of(value, annotation)
    bare = isinstance(value, str) and not text.startswith('"')
    return quoted(text, within="entry") if bare else text


def _string_text(value: str, annotation: Any) -> str:
    text = quoted(value)
    if text.startswith('"'):
        return text
    try:
        back = read(Word(text, 0, len(text)), annotation)
    except MismatchError:
        back = None
    # A bare word that would be read as another type needs its quotes.
    return text if type(back) is str and back == value else f'"{text}"'


def _python_name(value: object) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__name__
    return str(name).replace("<", "").replace(">", "")


# -- Python values -----------------------------------------------------------------------------


def conform(value: Any, annotation: Any) -> Any:
    """The value in the form that reading its text gives: lists as tuples, integers as floats.

    Raises:
        MismatchError: The value is not of the type.
    """
    nested: MismatchError | None = None
    for member in _members(annotation):
        try:
            return _conform_one(value, member)
        except MismatchError as mismatch:
            if mismatch.value is not value:
                nested = mismatch
    raise nested or MismatchError(expected(annotation), value=value)


def _conforms(value: Any, annotation: Any) -> bool:
    try:
        conform(value, annotation)
    except MismatchError:
        return False
    return True


def _conform_one(value: Any, annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin in _SEQUENCES and get_args(annotation) and isinstance(value, list | tuple):
        item_types = _item_types(annotation, len(value))
        if item_types is not None:
            items = map(conform, value, item_types)
            return list(items) if origin is list else tuple(items)
    elif origin in _MAPPINGS and get_args(annotation) and isinstance(value, Mapping):
        key_type, value_type = get_args(annotation)
        return {conform(k, key_type): conform(v, value_type) for k, v in value.items()}
    elif origin is Literal:
        if any(type(value) is type(a) and value == a for a in get_args(annotation)):
            return value
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif annotation is None:
        if value is None:
            return value
    elif _is_instance(value, origin or annotation):
        return value
    raise MismatchError(expected(annotation), value=value)


def _is_instance(value: Any, kind: Any) -> bool:
    if kind is Callable:
        return callable(value)
    try:
        return isinstance(value, kind)
    except TypeError:  # Any, a protocol, a type variable: nothing that can be checked
        return True
