"""A folder that holds what is needed to see a failure of a pass again."""

from __future__ import annotations

import json
import logging
import platform
import shutil
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from torchlathe._version import __version__
from torchlathe.ir import Program
from torchlathe.passes.base import Pass
from torchlathe.passes.registry import plugin_of
from torchlathe.passes.spec import pipeline_text

__all__ = ["Reproducer", "SaveProgram", "write_reproducer"]

log = logging.getLogger("torchlathe")

SaveProgram = Callable[[Program, Path], None]

_SCRIPT = '''\
"""Run the pass that failed again, on the program that it failed on."""

from pathlib import Path

import torchlathe as tl

here = Path(__file__).parent
{plugins}program = tl.load(here / "program.tl").program
tl.PassManager((here / "remaining.txt").read_text(), verify={level!r}).run(program, seed={seed})
'''

_README = """\
{error}

To see it again:

    {command}

pipeline.txt   all passes; remaining.txt has those from the failing one on
program.txt    the program before the failing pass
traceback.txt  where it failed
versions.json  what it ran on
"""


@dataclass(frozen=True)
class Reproducer:
    """A reproducer folder that was written.

    Attributes:
        folder: Where it is.
        command: What to run to see the failure again.
    """

    folder: Path
    command: str


def write_reproducer(
    parent: Path,
    program: Program,
    passes: Sequence[Pass],
    position: int,
    error: BaseException,
    *,
    level: str = "fast",
    seed: int = 0,
    save_program: SaveProgram | None = None,
) -> Reproducer | None:
    """Write a new folder ``<parent>/<failing pass>-<number>``, complete or not at all.

    Args:
        parent: Folder for reproducers; made if absent.
        program: The program before the failing pass.
        passes: The whole pipeline.
        position: Of the failing pass, from 1.
        error: What it raised.
        level: The level of verification of the run.
        seed: The seed of the run.
        save_program: Writes the program with its tensors to a file.

    Returns:
        The folder and the command, or None if it could not be written: that is logged, and must
        not hide the failure itself.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    except OSError as problem:
        log.warning("no reproducer could be written to %s: %s", parent, problem)
        return None
    try:
        saved = _save(program, partial / "program.tl", save_program)
        folder = _free(parent, passes[position - 1].name)
        if saved:
            loads = "".join(f"tl.passes.load_plugin({origin!r})\n" for origin in _plugins(passes))
            script = _SCRIPT.format(plugins=loads, level=level, seed=seed)
            (partial / "reproduce.py").write_text(script, encoding="utf-8")
            command = f"python {folder / 'reproduce.py'}"
        else:
            flags = "".join(f" --plugin {origin}" for origin in _plugins(passes))
            flags += f" --verify {level} --seed {seed}"
            command = f"torchlathe compile MODEL --passes @{folder / 'pipeline.txt'}{flags}"
        for name, text in _texts(program, passes, position, error, command).items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(folder)
    except Exception as problem:
        shutil.rmtree(partial, ignore_errors=True)
        log.warning("no reproducer could be written to %s: %s", parent, problem)
        return None
    return Reproducer(folder, command)


def _save(program: Program, path: Path, save_program: SaveProgram | None) -> bool:
    if save_program is None:
        return False
    try:
        save_program(program, path)
    except Exception as problem:
        # A program that a pass left half done may be one that cannot be saved; the text goes on.
        log.warning("the reproducer goes without the program itself: %s", problem)
        path.unlink(missing_ok=True)
        return False
    return True


def _free(parent: Path, name: str) -> Path:
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{number}"


def _plugins(passes: Sequence[Pass]) -> list[str]:
    """Files and modules that the passes were loaded from."""
    origins = (plugin_of(type(item)) for item in passes)
    return list(dict.fromkeys(origin for origin in origins if origin is not None))


def _texts(
    program: Program, passes: Sequence[Pass], position: int, error: BaseException, command: str
) -> dict[str, str]:
    versions = {
        "torchlathe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    trace = traceback.format_exception(type(error), error, error.__traceback__)
    return {
        "pipeline.txt": pipeline_text(passes) + "\n",
        "remaining.txt": pipeline_text(passes[position - 1 :]) + "\n",
        "program.txt": program.to_text().rstrip() + "\n",
        "traceback.txt": "".join(trace),
        "versions.json": json.dumps(versions, indent=2) + "\n",
        "README.txt": _README.format(error=error, command=command),
    }
