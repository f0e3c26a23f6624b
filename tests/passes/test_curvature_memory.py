"""The sweep keeps to its memory, and goes on from where it was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.passes.test_curvature import NETS, problem, true_hessian
from torchlathe.passes import HessianSensitivity
from torchlathe.passes.analysis.curvature import Objective, Sensitivity
from torchlathe.passes.analysis.curvature.outputs import OutputHessian
from torchlathe.passes.analysis.curvature.sums import grouped, largest
from torchlathe.passes.statistics import Calibration


def analysed(batches: Any = None, said: list[str] | None = None, **options: Any) -> Sensitivity:
    program, ctx = problem(*NETS["conv"])
    progress = None if said is None else said.append
    data = ctx.calibration if batches is None else batches
    analysis = HessianSensitivity(**options)
    return analysis.on(program, calibration=data, loss=ctx.loss, progress=progress)


def everything(s: Sensitivity) -> list[torch.Tensor]:
    """All that the sweep found."""
    found = [torch.tensor([s.loss]), *s._found.gradient.values(), *s._found.diagonal.values()]
    for layer in s.layers.values():
        found += [layer.inputs, layer.outputs, layer.mean]
    for samples in (s._found.hessian_samples, s._found.ggn_samples):
        found += [torch.tensor(batch) for each in samples.values() for batch in each]
    return found


def same(a: Sensitivity, b: Sensitivity) -> None:
    ours, theirs = everything(a), everything(b)
    assert len(ours) == len(theirs)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("diagonal", ["ggn", "fisher", "fisher-per-sample"])
def test_what_is_in_files_is_the_same(diagonal: Any, tmp_path: Path) -> None:
    _, ctx = problem(*NETS["conv"])
    options: dict[str, Any] = {"diagonal": diagonal, "samples": 0}
    plain = analysed(**options)
    said: list[str] = []
    batches = Calibration(ctx.calibration or (), spill=tmp_path)
    spilled = analysed(batches, said, limit_bytes=1200, **options)
    # There is no room for the vectors of the root either, so that vectors drawn differ by rounding.
    for ours, theirs in zip(everything(plain), everything(spilled), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert len(spilled.layers) == len(plain.layers) == 3  # none makes do with a diagonal
    assert plain._found.spilled_bytes == 0 < spilled._found.spilled_bytes
    assert "of matrices in files" in said[-1]
    assert not list(tmp_path.iterdir())


def test_the_limit_that_comes_with_the_batches() -> None:
    _, ctx = problem(*NETS["conv"])
    assert analysed(Calibration(ctx.calibration or (), limit_bytes=0))._found.spilled_bytes
    given = analysed(Calibration(ctx.calibration or (), limit_bytes=0), limit_bytes=2**20)
    assert not given._found.spilled_bytes  # what the pass itself was told counts more


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_probes_of_groups_estimate_the_same_blocks(mode: Any) -> None:
    options: dict[str, Any] = {"samples": 80, "mode": mode, "diagonal": "hessian"}
    s = analysed(limit_bytes=0, **options)  # each parameter is a group of its own
    hessian = true_hessian(s.objective)
    place = 0
    for name, tensor in s.objective.parameters().items():
        block = hessian[place : place + tensor.numel(), place : place + tensor.numel()]
        place += tensor.numel()
        found = s.trace(name)
        # Five standard errors; a block of one element has no noise at all.
        allowed = 5 * found.standard_error + 1e-9
        assert abs(found.value - float(block.trace())) < allowed
        # Within a block, the noise of a diagonal is what stands beside it.
        noise = ((block.square().sum(1) - block.diagonal().square()).clamp_min(0) / 80).sqrt()
        error = (s.diagonal(name).flatten() - block.diagonal()).abs()
        # Noise differs from batch to batch, and the larger one decides.
        assert (error < 10 * noise + 1e-9).all()


def test_groups_hold_to_their_size() -> None:
    parameters = {
        name: torch.zeros(size) for name, size in zip("abcde", (3, 3, 9, 1, 1), strict=True)
    }
    groups = grouped(parameters, 24)
    assert groups == [("a", "b"), ("c",), ("d", "e")]  # c alone is larger than that
    assert largest(parameters, groups) == 36
    assert grouped(parameters, 0) == [(name,) for name in "abcde"]
    assert grouped({}, 0) == []


@pytest.mark.parametrize("net", NETS)
def test_a_root_without_room_for_its_vectors(net: str) -> None:
    program, ctx = problem(*NETS[net])
    objective = Objective(program, ctx)
    batch = next(iter(objective))
    with objective.running(batch):
        outputs = objective.outputs(objective.leaves(), batch)
        hessian = OutputHessian(objective, outputs, batch)
    vector = torch.randn(hessian.shapes[0]).double()
    kept, passed = hessian.root([vector])[0], hessian.root([vector], room=0)[0]
    # Rounding at the eigenvalues that are zero, of which the root takes half of the digits.
    torch.testing.assert_close(passed, kept, rtol=1e-5, atol=1e-6)


CHILD = """
import sys, torch
from torch import nn
import torchlathe as tl
from torchlathe.passes import HessianSensitivity
from torchlathe.tools.bench.memory import PeakMemory

torch.set_num_threads(1)
def loss(outputs, batch):
    return outputs.square().sum(1).mean()
def stack(width):
    model = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(width, width), nn.Tanh())))
    data = [torch.randn(8, width) for _ in range(2)]
    return tl.capture(model.eval(), (data[0],)), data
def run(width, limit):
    program, data = stack(width)
    analysis = HessianSensitivity(samples=1, limit_bytes=limit)
    with PeakMemory(0.002) as memory:
        analysis.on(program, calibration=data, loss=loss)
    return memory.rise
run(4, 0)  # whatever is imported is
print(run(1000, int(sys.argv[1])))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory as Linux tells it")
def test_the_peak_of_memory_follows_the_limit() -> None:
    # Freed memory goes back at once, so that what is measured is what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    weight = 4 * 1000 * 1000  # bytes; there are 6 with a gradient, a diagonal, A and G each
    peaks = []
    for limit in (40 * weight, 6 * weight):
        command = [sys.executable, "-c", textwrap.dedent(CHILD), str(limit)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        peaks.append(int(done.stdout))
    # All is kept in memory: 24 matrices, and the signs and gradients of a probe.
    assert peaks[0] > 24 * weight
    # The limit, a few matrices on their way, and the values of a batch.
    assert peaks[1] < (6 + 6) * weight


# -- going on ------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Stops:
    """Batches that end in an error after so many."""

    def __init__(self, data: Any, after: int) -> None:
        self.data, self.after = list(data), after

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        yield from self.data[: self.after]
        raise Interrupted


@pytest.mark.parametrize("limit", [None, 1200], ids=["in memory", "in files"])
@pytest.mark.parametrize("diagonal", ["ggn", "hessian", "fisher-per-sample"])
def test_an_interrupted_sweep_goes_on_bit_by_bit(diagonal: Any, limit: Any, tmp_path: Path) -> None:
    _, ctx = problem(*NETS["conv"])
    data = [*(ctx.calibration or ()), *(ctx.calibration or ())]
    options: dict[str, Any] = {"samples": 6, "draws": 2, "rows": 20, "diagonal": diagonal}
    options |= {"limit_bytes": limit}
    want = analysed(data, **options)
    with pytest.raises(Interrupted):
        analysed(Calibration(Stops(data, 3), resume=tmp_path, save_every=1), **options)
    (file,) = tmp_path.iterdir()
    said: list[str] = []
    got = analysed(Calibration(data, resume=tmp_path), said, **options)
    assert [text.partition(" (")[0] for text in said] == [
        "curvature: batch 1 was seen before",
        "curvature: batch 2 was seen before",
        "curvature: batch 3 was seen before",
        "curvature: batch 4 of 4",
    ]
    same(want, got)
    # A finished sweep is found again, and one that asks for something else is another.
    same(want, analysed(Calibration(data, resume=tmp_path), **options))
    assert list(tmp_path.iterdir()) == [file]
    analysed(Calibration(data, resume=tmp_path), **{**options, "draws": 1})
    assert len(list(tmp_path.iterdir())) == 2
