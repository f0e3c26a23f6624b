"""The grammar of text pipelines; see `torchlathe.ir.text`."""

from torchlathe.ir.text.syntax import (
    DictSyntax,
    ListSyntax,
    OptionSyntax,
    PassSyntax,
    Syntax,
    Word,
    parse,
    pointed,
    quoted,
)

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
