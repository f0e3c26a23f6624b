"""Making an object of its text form, and writing that form.

What is made is a dataclass with a ``name``: a pass, or a backend. Its options are its fields.
"""

from __future__ import annotations

import re
from typing import Any

from torchlathe.ir.errors import OptionError, SpecError
from torchlathe.ir.text.options import (
    MismatchError,
    Option,
    conform,
    did_you_mean,
    options_of,
    read,
    text_of,
)
from torchlathe.ir.text.syntax import OptionSyntax, PassSyntax, Word, pointed

__all__ = ["build", "conform_fields", "spec_of"]


def build(cls: Any, text: str, syntax: PassSyntax) -> Any:
    """Make an object of this class with the options of a piece of text.

    Args:
        cls: A dataclass with a ``name``.
        text: The whole text, for messages that point into it.
        syntax: The part of it that names the class, with its options.

    Raises:
        SpecError: An option that is not known, is missing, or is given twice.
        OptionError: A value is not of its option's type, or the class refuses it.
    """
    known = {option.key: option for option in options_of(cls)}
    values: dict[str, Any] = {}
    for item in syntax.options:
        option = known.get(_key(item))
        if option is None:
            raise SpecError(
                _at(text, item.key, f"{cls.name} has no option {item.key.text}"),
                hint=did_you_mean(_key(item), known),
            )
        if option.name in values:
            raise SpecError(_at(text, item.key, f"option {option.key} is given twice"))
        values[option.name] = _value(text, cls.name, option, item)
    missing = [o.key for o in known.values() if o.required and o.name not in values]
    if missing:
        raise SpecError(_at(text, syntax.name, f"{cls.name} needs {', '.join(missing)}"))
    try:
        return cls(**values)
    except OptionError as error:
        place = _culprit(error.message, syntax)
        raise OptionError(_at(text, place, error.message), hint=error.hint) from error


def spec_of(made: Any) -> str:
    """An object as text: its name, and the options that are not at their defaults."""
    texts = []
    cls: type = type(made)
    for option in options_of(cls):
        text = text_of(getattr(made, option.name), option.type)
        if option.required or text != option.default_text:
            texts.append(f"{option.key}={text}")
    return f"{made.name}{{{','.join(texts)}}}" if texts else str(made.name)


def conform_fields(made: Any) -> None:
    """Bring the fields of a frozen dataclass into the form that reading its text gives.

    Raises:
        OptionError: A value is not of the type of its field.
    """
    cls: type = type(made)
    for option in options_of(cls):
        try:
            value = conform(getattr(made, option.name), option.type)
        except MismatchError as mismatch:
            found = mismatch.value
            raise OptionError(
                f"{option.name} of {made.name}: expected {mismatch.wanted}, "
                f"got {found!r} of type {type(found).__name__}"
            ) from None
        object.__setattr__(made, option.name, value)


def _key(item: OptionSyntax) -> str:
    return item.key.text.replace("_", "-")


def _at(text: str, word: Word, message: str) -> str:
    return pointed(message, text, word.start, word.end)


def _value(text: str, owner: str, option: Option, item: OptionSyntax) -> Any:
    of = f"{option.key} of {owner}"
    # A lone name stands for `true`, and is pointed at as such.
    syntax = item.value or Word("true", item.key.start, item.key.end)
    try:
        return read(syntax, option.type)
    except MismatchError as mismatch:
        if item.value is None:
            message = f"{of} needs a value: {option.type_text}"
            raise SpecError(_at(text, item.key, message)) from None
        part = mismatch.syntax or syntax
        found = text[part.start : part.end]
        raise OptionError(
            pointed(f"{of}: expected {mismatch.wanted}, got {found}", text, part.start, part.end)
        ) from None


def _culprit(message: str, syntax: PassSyntax) -> Word:
    """The option that the object's own complaint names first, else its name."""
    found = [
        (match.start(), item.key)
        for item in syntax.options
        if (match := re.search(rf"\b{_key(item).replace('-', '[-_]')}\b", message))
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else syntax.name
