"""Where the commands print to."""

from __future__ import annotations

import os

from rich.console import Console

__all__ = ["output"]

_WIDTH = 110  # of a file or a pipe, which have none


def output() -> Console:
    """Standard output, in the width of the terminal or of the variable COLUMNS."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    return console
