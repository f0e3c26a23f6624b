"""gptq that is killed goes on where it was, and gives what it would have given."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.passes.test_quantize import tied
from torchlathe import PassManager
from torchlathe.ir import Error, Program

SPEC = 'quantize{{scheme=w4a16,group=32,method=gptq,checkpoint="{}"}}'


def test_finished_layers_are_not_swept_again(tmp_path: Path) -> None:
    _, program, data = tied()
    spec = SPEC.format(tmp_path)
    first = PassManager(spec, verify=False).run(program, calibration=data)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files[4:]:
        file.unlink()
    second = PassManager(spec, verify=False).run(program, calibration=data)
    assert second.history[-1].statistics["resumed"] == 4
    for name, entry in first.entries.items():
        assert torch.equal(entry.tensor, second.entries[name].tensor)
    # Other data are another run.
    third = PassManager(spec, verify=False).run(program, calibration=data[:2])
    assert third.history[-1].statistics["resumed"] == 0


def test_layers_of_a_run_that_began_otherwise_are_not_taken(tmp_path: Path) -> None:
    _, program, data = tied()
    spec = SPEC.format(tmp_path)

    def resumed(change: Callable[[Program], None]) -> tuple[float, Program]:
        other = program.copy()
        change(other)
        after = PassManager(spec, verify=False).run(other, calibration=data)
        return after.history[-1].statistics["resumed"], after

    def move(name: str) -> Callable[[Program], None]:
        def run(other: Program) -> None:
            with other.edit(by="a test") as edit:
                edit.set_tensor(name, other.tensor(name).detach() * 1.5)

        return run

    _, first = resumed(lambda _: None)
    swept = [row["layer"] for row in first.history[-1].details["quantised"]]
    norm = next(n for n, e in program.entries.items() if "norm" in n and e.tensor.dim() == 1)
    # Of layers only those before the one that moved; a norm is before any.
    for number in (0, 3, 6):
        assert resumed(move(swept[number]))[0] == number
    assert resumed(move(norm))[0] == 0
    assert resumed(lambda _: None)[0] == 7


def test_a_broken_file_is_an_error(tmp_path: Path) -> None:
    _, program, data = tied()
    spec = SPEC.format(tmp_path)
    PassManager(spec, verify=False).run(program, calibration=data)
    next(iter(sorted(tmp_path.iterdir()))).write_bytes(b"nothing of the kind")
    with pytest.raises(Error, match="a finished layer cannot be read"):
        PassManager(spec, verify=False).run(program, calibration=data)


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    spec = SPEC.format(tmp_path / "layers")
    (tmp_path / "layers").mkdir()
    script = textwrap.dedent(f"""
        import time
        import torch
        from tests.passes.test_quantize import tied
        from torchlathe import PassManager
        _, program, data = tied()
        slow = lambda text: time.sleep(0.5 if "gptq of" in text else 0)
        PassManager({spec!r}, verify=False).run(program, calibration=data, progress=slow)
    """)
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, env={**os.environ})
    layers = tmp_path / "layers"
    for _ in range(1200):
        if len(list(layers.glob("0*.safetensors"))) >= 2 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = len(list(layers.glob("0*.safetensors")))
    assert 2 <= finished < 7
    _, program, data = tied()
    after = PassManager(spec, verify=False).run(program, calibration=data)
    assert after.history[-1].statistics["resumed"] == finished
    plain = PassManager(spec.partition(",checkpoint")[0] + "}", verify=False).run(
        program, calibration=data
    )
    for name, entry in plain.entries.items():
        assert torch.equal(entry.tensor, after.entries[name].tensor)
