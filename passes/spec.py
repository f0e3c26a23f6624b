"""Pipelines as text: ``"structured-erase{sparsity=0.5},quantize{scheme=w8a8}"``.

``parse_pipeline(pipeline_text(passes)) == passes`` for all options that text can hold. Dashes and
underscores mean the same in names; a lone option name means ``true``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torchlathe.ir import OptionError, SpecError
from torchlathe.passes.base import Pass
from torchlathe.passes.options import MismatchError, Option, did_you_mean, options_of, read
from torchlathe.passes.registry import get_pass
from torchlathe.passes.syntax import OptionSyntax, PassSyntax, Word, parse, pointed

__all__ = ["parse_pipeline", "pipeline_text"]


def pipeline_text(passes: Iterable[Pass]) -> str:
    """The passes as one line of text."""
    return ",".join(item.spec() for item in passes)


def parse_pipeline(text: str) -> list[Pass]:
    """Read the passes of a text pipeline.

    Raises:
        SpecError: The text does not follow the grammar, or a pass or option is not known.
        OptionError: A value is not of its option's type, or the pass refuses it.
    """
    return [_build(text, syntax) for syntax in parse(text)]


def _build(text: str, syntax: PassSyntax) -> Pass:
    name = syntax.name
    try:
        cls = get_pass(name.text)
    except SpecError as error:
        message = pointed(error.message, text, name.start, name.end)
        raise SpecError(message, where=error.where, hint=error.hint) from error.__cause__
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
        values[option.name] = _value(text, cls, option, item)
    missing = [o.key for o in known.values() if o.required and o.name not in values]
    if missing:
        raise SpecError(_at(text, name, f"{cls.name} needs {', '.join(missing)}"))
    try:
        return cls(**values)
    except OptionError as error:
        place = _culprit(error.message, syntax)
        raise OptionError(_at(text, place, error.message), hint=error.hint) from error


def _key(item: OptionSyntax) -> str:
    return item.key.text.replace("_", "-")


def _at(text: str, word: Word, message: str) -> str:
    return pointed(message, text, word.start, word.end)


def _value(text: str, cls: type[Pass], option: Option, item: OptionSyntax) -> Any:
    of = f"{option.key} of {cls.name}"
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
    """The option that a pass' own complaint names first, else the pass itself."""
    found = [
        (match.start(), item.key)
        for item in syntax.options
        if (match := re.search(rf"\b{_key(item).replace('-', '[-_]')}\b", message))
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else syntax.name
