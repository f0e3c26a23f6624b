"""Pipelines as text: ``"structured-erase{sparsity=0.5},quantize{scheme=w8a8}"``.

``parse_pipeline(pipeline_text(passes)) == passes`` for all options that text can hold. Dashes and
underscores mean the same in names; a lone option name means ``true``.
"""

from __future__ import annotations

from collections.abc import Iterable

from torchlathe.ir import SpecError
from torchlathe.ir.text.building import build
from torchlathe.passes.base import Pass
from torchlathe.passes.registry import get_pass
from torchlathe.passes.syntax import PassSyntax, parse, pointed

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
    built: Pass = build(cls, text, syntax)
    return built
