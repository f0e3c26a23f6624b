"""Writing files at once or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["atomic", "copy_file", "write_text"]


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a draft beside the file, which takes its place if nothing goes wrong.

    Args:
        path: The file; it is replaced if it exists, and left as it is if the block raises.

    Raises:
        OSError: The file system refuses.
    """
    target = Path(path)
    # The suffix stays last, since some writers choose the format by it.
    draft = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        os.replace(draft, target)
    finally:
        with suppress(OSError):
            os.unlink(draft)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 atomically.

    Raises:
        OSError: The file system refuses.
    """
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")


def copy_file(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copy a file atomically.

    Raises:
        OSError: The file system refuses.
    """
    with atomic(path) as draft:
        shutil.copyfile(source, draft)
