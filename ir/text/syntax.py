"""The grammar of text pipelines, without any knowledge of passes or backends.

::

    pipeline := [pass ("," pass)*]
    pass     := name ["{" [option ("," option)*] "}"]
    option   := name ["=" value]
    value    := word | '"' JSON string '"' | "[" [value ("," value)*] "]"
              | "{" [entry ("," entry)*] "}"
    entry    := word ":" value

A bare key ends at the last ``:`` of the text around it, so that ``{up.weight:0/1:0.5}`` gives 0.5
to ``up.weight:0/1``. A bare value in an entry has no ``:``, then; one that has is quoted.

White space and ``# comments`` may stand between any two tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Never, TypeVar

from torchlathe.ir.errors import SpecError

__all__ = [
    "DictSyntax",
    "ListSyntax",
    "OptionSyntax",
    "PassSyntax",
    "Syntax",
    "Word",
    "parse",
    "pointed",
    "quoted",
]

T = TypeVar("T")

_BLANK = re.compile(r"(?:\s|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_WORD = re.compile(r"[^\s,={}\[\]<>\"'#]+")
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_PYTHON_ONLY = re.compile(r"<[^>\n]*>?")


@dataclass(frozen=True)
class Word:
    """A bare or quoted piece of text, and where it stands."""

    text: str
    start: int
    end: int
    quoted: bool = False


@dataclass(frozen=True)
class ListSyntax:
    """``[a,b]``."""

    items: tuple[Syntax, ...]
    start: int
    end: int


@dataclass(frozen=True)
class DictSyntax:
    """``{a:1,b:2}``."""

    items: tuple[tuple[Word, Syntax], ...]
    start: int
    end: int


Syntax = Word | ListSyntax | DictSyntax


@dataclass(frozen=True)
class OptionSyntax:
    """``key=value``, or a lone ``key``."""

    key: Word
    value: Syntax | None


@dataclass(frozen=True)
class PassSyntax:
    """``name{options}``."""

    name: Word
    options: tuple[OptionSyntax, ...]


def parse(text: str) -> tuple[PassSyntax, ...]:
    """Read a text pipeline into its syntax tree.

    Raises:
        SpecError: The text does not follow the grammar.
    """
    return _Reader(text).pipeline()


def pointed(message: str, text: str, start: int, end: int) -> str:
    """The message, the line of the text that holds ``start``, and carets under the span."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", start)
    last = len(text) if last < 0 else last
    line = text[first:last].replace("\t", " ")
    carets = "^" * max(1, min(end, last) - start)
    if "\n" in text:
        message += f", line {text.count(chr(10), 0, start) + 1}"
    return f"{message}\n    {line}\n    {' ' * (start - first)}{carets}"


def quoted(text: str, *, within: Literal["list", "entry"] = "list") -> str:
    """The text as a word of the grammar: bare where that reads back, else in quotes.

    Args:
        text: What the word says.
        within: "entry" for the value of an entry; a key, and all else, is as in a list.
    """
    if _WORD.fullmatch(text) and not (within == "entry" and ":" in text):
        return text
    return json.dumps(text, ensure_ascii=False)


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def pipeline(self) -> tuple[PassSyntax, ...]:
        passes: list[PassSyntax] = []
        if self._peek():
            passes.append(self._pass())
        while self._peek():
            if not self._take(","):
                self._fail("expected ',' between passes")
            passes.append(self._pass())
        return tuple(passes)

    def _pass(self) -> PassSyntax:
        name = self._name("a pass name")
        if self._peek() != "{":
            return PassSyntax(name, ())
        options, _ = self._sequence("{", "}", self._option)
        return PassSyntax(name, options)

    def _option(self) -> OptionSyntax:
        key = self._name("an option name")
        return OptionSyntax(key, self._value() if self._take("=") else None)

    def _value(self) -> Syntax:
        char = self._peek()
        start = self.at
        if char == "[":
            items, end = self._sequence("[", "]", self._value)
            return ListSyntax(items, start, end)
        if char == "{":
            entries, end = self._sequence("{", "}", self._entry)
            return DictSyntax(entries, start, end)
        return self._word(_WORD, "a value")

    def _entry(self) -> tuple[Word, Syntax]:
        key = self._word(_WORD, "a key")
        if key.quoted or self._peek() == ":":
            if not self._take(":"):
                self._fail("expected ':' after the key")
            return key, self._value()
        text, colon, rest = key.text.rpartition(":")
        if not colon:
            self._fail("expected ':' after the key")
        if not text:
            self._fail("expected a key, found ':'", key.start, key.start + 1)
        # What follows the last colon is read again, as the value.
        self.at = key.end - len(rest)
        return Word(text, key.start, self.at - 1), self._value()

    def _sequence(
        self, opening: str, closing: str, item: Callable[[], T]
    ) -> tuple[tuple[T, ...], int]:
        start = self.at
        self._take(opening)
        items: list[T] = []
        while not self._take(closing):
            if items and not self._take(","):
                if not self._peek():
                    self._fail(f"'{opening}' is never closed", start, start + 1)
                self._fail(f"expected ',' or '{closing}'")
            if not self._peek():
                self._fail(f"'{opening}' is never closed", start, start + 1)
            items.append(item())
        return tuple(items), self.at

    def _name(self, what: str) -> Word:
        self._peek()
        match = _NAME.match(self.text, self.at)
        if match is None:
            self._fail(f"expected {what}")
        self.at = match.end()
        return Word(match[0], match.start(), match.end())

    def _word(self, pattern: re.Pattern[str], what: str) -> Word:
        char = self._peek()
        start = self.at
        if char == '"':
            match = _STRING.match(self.text, start)
            if match is None:
                self._fail("the text in quotes has no end", start, len(self.text))
            self.at = match.end()
            try:
                return Word(json.loads(match[0], strict=False), start, self.at, quoted=True)
            except json.JSONDecodeError:
                self._fail(f"{match[0]} has an escape that JSON does not know", start, self.at)
        if char == "'":
            self._fail("text is quoted with double quotes, not single ones")
        if match := _PYTHON_ONLY.match(self.text, start):
            self._fail(
                f"the value {match[0]} exists only in Python",
                start,
                match.end(),
                hint="build this pipeline from objects: PassManager([MyPass(option=value)])",
            )
        match = pattern.match(self.text, start)
        if match is None:
            self._fail(f"expected {what}")
        self.at = match.end()
        return Word(match[0], start, self.at)

    def _peek(self) -> str:
        """The next character that counts; empty at the end."""
        blank = _BLANK.match(self.text, self.at)
        assert blank is not None  # it matches the empty text too
        self.at = blank.end()
        return self.text[self.at : self.at + 1]

    def _take(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self.at += 1
        return True

    def _fail(
        self,
        message: str,
        start: int | None = None,
        end: int | None = None,
        hint: str | None = None,
    ) -> Never:
        if start is None:
            start = self.at
            found = self.text[start : start + 1]
            message += f", found {found!r}" if found else ", but the text ends"
        raise SpecError(pointed(message, self.text, start, end or start + 1), hint=hint)
