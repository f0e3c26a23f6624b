import json
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import torchlathe
from tests.passes import sample_passes
from tests.passes.sample_passes import (
    Everything,
    Misbehave,
    Nothing,
    ReluToClamp,
    small_net,
)
from torchlathe.ir import PassError, Program
from torchlathe.passes import PassManager, load_plugin

pytestmark = pytest.mark.usefixtures("samples")


def failing(program: Program, manager: PassManager) -> PassError:
    with pytest.raises(PassError) as caught:
        manager.run(program)
    return caught.value


def test_nothing_is_written_unless_asked(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = failing(program, PassManager(Misbehave))
    assert "reproducer" not in str(error)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_holds_what_is_needed(program: Program, tmp_path: Path) -> None:
    passes = [ReluToClamp(), Misbehave("claim_change"), Nothing()]
    error = failing(program, PassManager(passes, reproducer_dir=tmp_path / "made"))
    folder = tmp_path / "made" / "misbehave-1"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts["pipeline.txt"] == "relu-to-clamp,misbehave{how=claim_change},nothing\n"
    assert texts["remaining.txt"] == "misbehave{how=claim_change},nothing\n"
    before = PassManager(ReluToClamp).run(program)
    assert texts["program.txt"] == before.to_text().rstrip() + "\n"
    assert "Traceback (most recent call last)" in texts["traceback.txt"]
    assert "made no edit" in texts["traceback.txt"]
    assert json.loads(texts["versions.json"])["torch"] == torch.__version__
    assert json.loads(texts["versions.json"])["torchlathe"] == torchlathe.__version__
    command = (
        f"torchlathe compile MODEL --passes @{folder}/pipeline.txt "
        "--plugin tests.passes.sample_passes --verify fast --seed 0"
    )
    assert command in texts["README.txt"]
    assert "made no edit" in texts["README.txt"]
    assert error.hint is not None
    assert error.hint.endswith(f"a reproducer is in {folder}, to see this again: {command}")
    assert set(texts) == {
        "README.txt",
        "pipeline.txt",
        "program.txt",
        "remaining.txt",
        "traceback.txt",
        "versions.json",
    }


def test_folders_are_numbered(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHLATHE_REPRODUCER", str(tmp_path))
    failing(program, PassManager(Misbehave))
    failing(program, PassManager(Misbehave))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["misbehave-1", "misbehave-2"]


UNLUCKY = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torchlathe.passes import RewritePass

@dataclass(frozen=True)
class Unlucky(RewritePass):
    name: ClassVar[str] = "unlucky"

    def run(self, program, ctx):
        raise ValueError(f"drew {torch.rand(()).item()} of {sorted(program.parameters)}")
"""


@pytest.mark.usefixtures("own_registry")
def test_the_script_fails_again(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(UNLUCKY)
    load_plugin(sample_passes)
    load_plugin(plugin)
    saved: dict[Path, Program] = {}

    def save(program: Program, path: Path) -> None:
        path.write_text("saved")
        saved[path.parent.parent / "unlucky-1" / path.name] = program.copy()

    manager = PassManager(
        "relu-to-clamp,unlucky", verify="full", reproducer_dir=tmp_path / "out", save_program=save
    )
    with pytest.raises(PassError) as first:
        manager.run(program, seed=3)
    script = tmp_path / "out" / "unlucky-1" / "reproduce.py"
    assert f"python {script}" in str(first.value)
    assert "verify='full'" in script.read_text()
    assert (script.parent / "program.tl").read_text() == "saved"

    monkeypatch.setattr(torchlathe, "load", lambda path: SimpleNamespace(program=saved[path]))
    with pytest.raises(PassError) as second:
        runpy.run_path(str(script))
    assert second.value.message.partition(": ")[2] == first.value.message.partition(": ")[2]


@pytest.mark.usefixtures("own_registry")
def test_a_failure_of_compile_is_seen_again_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text(UNLUCKY)
    load_plugin(plugin)
    monkeypatch.setenv("TORCHLATHE_REPRODUCER", str(tmp_path / "out"))
    with pytest.raises(PassError) as caught:
        torchlathe.compile(small_net(), "unlucky", (torch.randn(2, 4),), seed=5)
    command = str(caught.value).rpartition("to see this again: ")[2].split()
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode != 0
    assert caught.value.message in done.stderr


@pytest.mark.parametrize("what", ["program", "folder"])
def test_a_reproducer_that_cannot_be_written_hides_nothing(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    def save(program: Program, path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    parent = tmp_path / "out"
    if what == "folder":
        parent.write_text("a file")
    with caplog.at_level(logging.WARNING, logger="torchlathe"):
        error = failing(program, PassManager(Misbehave, reproducer_dir=parent, save_program=save))
    assert "no such thing as relu" in error.message
    if what == "folder":
        assert "no reproducer could be written" in caplog.text
        assert "reproducer is in" not in str(error)
    else:
        assert "goes without the program itself: disk full" in caplog.text
        assert not (parent / "misbehave-1" / "program.tl").exists()
        assert (parent / "misbehave-1" / "program.txt").exists()


def test_no_half_written_folder_is_left(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Program, **_: object) -> str:
        raise RuntimeError("cannot print")

    monkeypatch.setattr(Program, "to_text", broken)
    error = failing(program, PassManager(Misbehave, reproducer_dir=tmp_path))
    assert "no such thing as relu" in error.message
    assert list(tmp_path.iterdir()) == []


def test_values_from_python_are_shown_as_such(program: Program, tmp_path: Path) -> None:
    failing(program, PassManager([Misbehave(), Everything(function=len)], reproducer_dir=tmp_path))
    text = (tmp_path / "misbehave-1" / "pipeline.txt").read_text()
    assert text == "misbehave,everything{function=<len>}\n"
