"""The options of a pass; backends have theirs in the same form, see `torchlathe.ir.text`."""

from torchlathe.ir.text.options import (
    MismatchError,
    Option,
    conform,
    did_you_mean,
    expected,
    options_of,
    read,
    text_of,
)

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
