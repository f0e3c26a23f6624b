"""``torchlathe export``: write a saved model as files that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchlathe.tools.cli.parsing import Parser, UsageError

__all__ = ["add_parser", "run"]

_EPILOG = """\
examples:
  torchlathe export small.tl --like path/to/llama -o folder
  torchlathe export small.tl --like path/to/llama --format dense -o folder

`torchlathe compile MODEL --backend checkpoint --export DIR` does it without the file between.
"""


def add_parser(commands: Any, common: Parser) -> None:
    """Add the command to the parser of the command line."""
    parser: Parser = commands.add_parser(
        "export",
        parents=[common],
        help="write a saved model as a checkpoint of transformers",
        description="Write a model that torchlathe saved as a folder that transformers and vLLM "
        "load.",
        epilog=_EPILOG,
    )
    parser.add_argument("model", metavar="FILE", help="a model that torchlathe saved (.tl)")
    parser.add_argument(
        "--like",
        metavar="CONFIG",
        required=True,
        help="config.json of the model, or its folder: the class, and what it is built from",
    )
    parser.add_argument(
        "--format",
        choices=("compressed-tensors", "dense"),
        default="compressed-tensors",
        help="compressed-tensors (default) keeps stored numbers, dense what they stand for",
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write")
    parser.set_defaults(run=run, parser=parser)


def run(parsed: argparse.Namespace) -> int:
    """Load, check against the model's own code, and write."""
    if Path(parsed.output).is_file():
        raise UsageError(f"{parsed.output} is a file, and a checkpoint is a folder")
    from torchlathe.backends import CompiledModel, load
    from torchlathe.backends.checkpoints import Checkpoint
    from torchlathe.tools.checkpoints import skeleton

    like = Path(parsed.like)
    model = skeleton(like if like.is_dir() else like.parent)
    program = load(parsed.model).program
    made = CompiledModel(program, Checkpoint(format=parsed.format), source=model)
    made.export(parsed.output)
    print(f"wrote the checkpoint to {parsed.output}")
    return 0
