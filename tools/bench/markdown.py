"""Tables of results as Markdown, and the measured part of a page."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from torchlathe.ir.files import write_text

__all__ = ["MARK", "markdown_table", "rewrite_measured"]

# What is behind it on a page is written from results.
MARK: Final = "<!-- measured -->\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, with a line break at the end."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def rewrite_measured(page: Path, text: str) -> int:
    """Put a text in the place of all behind the mark; returns the exit status."""
    head, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        print(f"{page} has no line {MARK.strip()}", file=sys.stderr)
        return 1
    write_text(page, head + mark + "\n" + text)
    return 0
