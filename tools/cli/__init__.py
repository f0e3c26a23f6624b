"""The ``torchlathe`` command; importing it loads neither torch nor anything that needs it."""

from torchlathe.tools.cli.entry import main

__all__ = ["main"]
