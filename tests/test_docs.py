"""The examples in README.md and docs/ run, page by page, each in a folder of its own.

What a page may hold:

- a ``python`` block: runs; the blocks of a page share their names, in order;
- a ``python`` block right after ``<!-- file: my_passes.py -->``: is written to that file, or
  appended to it where an earlier block of the page began it;
- a ``console`` block: each line ``$ torchlathe ...`` runs and must succeed. The lines under it
  must appear in what it prints, in this order, where ``...`` stands for anything;
- ``<!-- norun -->`` right before any block: it is for reading only.
"""

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"^(?:<!--[ ]*(?P<note>[^\n]*?)[ ]*-->\n\s*?)?"
    r"^```(?P<language>python|console)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    language: str
    note: str
    text: str
    line: int  # of the file, that the text begins on


def blocks_of(page: str) -> list[Block]:
    return [
        Block(
            match["language"],
            match["note"] or "",
            match["text"],
            page.count("\n", 0, match.start("text")) + 1,
        )
        for match in BLOCK.finditer(page)
    ]


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output that is shown under it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.replace("\\\n", " ").partition("\n")
        yield command, shown


def shown_as(shown: str) -> re.Pattern[str]:
    """What output matches the lines that a page shows; spaces at line ends do not count."""
    lines = [line.strip() for line in shown.strip().splitlines()]
    pieces = [".*?".join(map(re.escape, line.split("..."))) for line in lines if line]
    return re.compile(".*?".join(pieces), re.DOTALL)


def run_command(command: str, shown: str, where: str) -> None:
    words = shlex.split(command)
    if words[0] != "torchlathe":
        return
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "torchlathe", *words[1:]],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.returncode == 0, f"{where}: $ {command}\n{done.stdout}\n{done.stderr}"
    assert shown_as(shown).search(done.stdout), (
        f"{where}: $ {command}\nthe page shows:\n{shown}\nbut it printed:\n{done.stdout}"
    )


def run_page(path: Path, module: types.ModuleType) -> int:
    count = 0
    started: set[str] = set()
    for block in blocks_of(path.read_text()):
        kind, _, value = block.note.partition(":")
        if kind == "norun":
            continue
        count += 1
        where = f"{path.name}:{block.line}"
        if kind == "file" and value.strip():
            with Path(value.strip()).open("a" if value in started else "w") as file:
                file.write(block.text)
            started.add(value)
        elif block.language == "console":
            for command, shown in commands_of(block):
                run_command(command, shown, where)
        else:  # lines keep their numbers, so that a traceback points into the page
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(path), "exec"), module.__dict__)
    return count


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"page_{path.stem}"
    module = types.ModuleType(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, name, module)
    # Files of another page or test may have been imported under the names that this one uses.
    for found, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None) or ""
        if file.startswith(str(tmp_path.parent)):
            monkeypatch.delitem(sys.modules, found)
    run_page(path, module)


def test_readme_has_examples() -> None:
    blocks = [b for b in blocks_of((ROOT / "README.md").read_text()) if b.note != "norun"]
    assert {b.language for b in blocks} == {"python", "console"}


SAMPLE = """\
Text.
```python
a = 1
```
<!-- norun -->
```python
a = 2 / 0
```

<!-- file: made.py -->

```python
def f():
    return 3
```
```python
import made
assert (a, made.f()) == (1, 3)
raise KeyError
```
"""


def test_a_page_runs_in_order_and_fails_at_its_own_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(SAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyError) as caught:
        run_page(page, types.ModuleType("page_sample"))
    assert caught.traceback[-1].lineno + 1 == SAMPLE.splitlines().index("raise KeyError") + 1
    sys.modules.pop("made", None)


def test_shown_output_is_held_to() -> None:
    block = blocks_of("```console\n$ torchlathe a \\\n  b\nx 1 ms\n...\nend\n$ ls\n```\n")[0]
    (command, shown), second = commands_of(block)
    assert (shlex.split(command), second) == (["torchlathe", "a", "b"], ("ls", ""))
    assert shown_as(shown).search("x 1 ms\nmore\nthe end\n")
    assert not shown_as(shown).search("x 2 ms\nend\n")
