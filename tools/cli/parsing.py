"""Argument parsing whose errors name the nearest thing that exists."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

__all__ = ["Parser", "UsageError", "nearest"]


class UsageError(Exception):
    """A command line that cannot be read.

    Args:
        message: What is wrong with it.
        hint: What to do next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n  next:  {self.hint}" if self.hint else message


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples, and shows each option's values once."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse, or say which option was probably meant.

        The default ``repeated`` of a command names the argument that takes several words: they may
        stand between and after options, where argparse takes those of one place alone.
        """
        parsed, unknown = self.parse_known_args(args, namespace)
        repeated = getattr(parsed, "repeated", None)
        words = [word for word in unknown if word != "--"]
        if repeated is not None and not any(word.startswith("-") for word in words):
            getattr(parsed, repeated).extend(words)
            unknown = []
        if unknown:
            parser: Parser = getattr(parsed, "parser", self)
            parser.refuse(unknown)
        result: argparse.Namespace = parsed
        return result

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise for arguments that no option took."""
        word = next((w for w in unknown if w.startswith("-")), unknown[0])
        if not word.startswith("-"):
            raise UsageError(
                f"unexpected argument {word!r}", f"see `{self.prog} --help` for what it takes"
            )
        name = word.partition("=")[0]
        known = [o for action in self._actions for o in action.option_strings]
        raise UsageError(
            f"unknown option {name!r}", nearest(name, known) or f"see `{self.prog} --help`"
        )

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(message, f"see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        kind = "command" if isinstance(action, argparse._SubParsersAction) else "value"
        name = f" for {action.option_strings[-1]}" if action.option_strings else ""
        raise UsageError(
            f"unknown {kind} {str(value)!r}{name}",
            nearest(str(value), known) or f"known are {', '.join(known)}",
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint with the names most like ``name``; None if none is."""
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.55)
    return f"did you mean {' or '.join(close)}?" if close else None
