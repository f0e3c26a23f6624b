"""Pictures of results: SVG files that are the same bytes for the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchlathe.ir.files import atomic

__all__ = ["svg"]


@contextmanager
def svg(path: Path, width: float, height: float, columns: int = 1) -> Iterator[list[Any]]:
    """Panels side by side to draw in; the file is written, whole, at the end.

    Args:
        path: Of the picture.
        width: Inches.
        height: Inches.
        columns: How many panels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "torchlathe"}), atomic(path) as draft:
        figure = Figure(figsize=(width, height))
        yield list(figure.subplots(1, columns, squeeze=False)[0])
        figure.tight_layout()
        figure.savefig(draft, format="svg", metadata={"Date": None})
