"""Memory of gptq: one layer is in work at a time, and what is computed once is held once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.passes.test_quantize import tied
from torchlathe import PassManager
from torchlathe.passes.rewrite.quantising import streaming
from torchlathe.passes.rewrite.quantising.grids import blank, quantised
from torchlathe.passes.statistics import LockstepRun

ROOT = Path(__file__).resolve().parents[2]


def test_jobs_hold_the_model_and_no_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, data = tied()
    own = {entry.tensor.data_ptr() for entry in program.entries.values()}
    jobs: list[streaming.Job] = []
    swept = streaming._swept

    def watched(job: streaming.Job, *rest: Any) -> Any:
        jobs.append(job)
        return swept(job, *rest)

    monkeypatch.setattr(streaming, "_swept", watched)
    PassManager("quantize{scheme=w4a16,group=32,method=gptq}", verify=False).run(
        program, calibration=data
    )
    assert len(jobs) == 7
    assert all(job.weight.data_ptr() in own for job in jobs)


def test_weights_are_dequantised_once_for_all_batches() -> None:
    _, program, data = tied()
    after = PassManager("quantize{scheme=w4a16,group=32}", verify=False).run(program)
    run = LockstepRun(after, [[x] for x in data])
    for node in after.graph.find_nodes(
        op="call_function", target=torch.ops.torchlathe.dequantize.default
    ):
        values = run.run_through(node)
        assert len(values) == len(data)
        assert all(value is values[0] for value in values)
    run = LockstepRun(after, [[x] for x in data])
    last = after.output_node.args[0][0]  # type: ignore[index]
    for x, found in zip(data, run.run_through(last), strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, after.run(x))


@pytest.mark.parametrize("name", ["int8", "int4", "nvfp4", "mxfp4", "int2"])
def test_a_blank_form_is_that_of_zeros(name: str) -> None:
    weight = torch.zeros(5, 64)
    for symmetric in (True, False) if name.startswith("int") else (True,):
        found = blank(weight, name, group=32, symmetric=symmetric)
        wanted = quantised(weight, name, group=32, symmetric=symmetric)
        for part in ("values", "scales", "zeros", "total"):
            old, new = getattr(wanted, part), getattr(found, part)
            assert (old is None) == (new is None)
            assert old is None or (torch.equal(old, new) and old.dtype == new.dtype)
        assert not bool(found.dequantised().any())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told by Linux alone")
def test_memory_grows_by_no_more_than_what_is_stored(tmp_path: Path) -> None:
    """Weights are mapped; a layer more adds its numbers, not its bf16 or float32 weights."""
    words = ["-m", "torchlathe.tools.bench.bench_streaming", "--size", "tiny", "--tokens", "32"]
    words += ["--output", str(tmp_path / "rows.json"), "--folder", str(tmp_path)]
    subprocess.run([sys.executable, *words, "--depths", "2", "8"], cwd=ROOT, check=True)
    import json

    few, many = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    grown = many["peak_bytes"] - few["peak_bytes"]
    stored = many["stored_bytes"] - few["stored_bytes"]
    # The allocator's own, and the graph of more nodes, are a few MiB; float32 copies of the six
    # layers would be 90.
    assert grown < 2 * stored + 8 * 2**20
