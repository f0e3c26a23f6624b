"""The parts of tuning and timing that need no GPU, and the whole on a CPU with a false clock."""

import json
import subprocess
import sys
import time
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchlathe.ir import UnsupportedError
from torchlathe.kernels.aot.finding import PINNED
from torchlathe.kernels.aot.matrix import all_cases
from torchlathe.kernels.tuning.table import TileTable
from torchlathe.kernels.tuning.tiles import BUCKETS
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.tools.cli import main
from torchlathe.tools.kernels import gpu_check, page, tuning
from torchlathe.tools.kernels import parts as checked
from torchlathe.tools.kernels.benching import Ceilings, Measurement, bench
from torchlathe.tools.kernels.further import FURTHER
from torchlathe.tools.kernels.layers import LAYERS, copies_for, make_layer
from torchlathe.tools.kernels.processes import Job, run_alone, run_together
from torchlathe.tools.kernels.rivals import gemlite_layer
from torchlathe.tools.kernels.timing import Samples, require_gpu, time_in_turn
from torchlathe.tools.kernels.verdict import Bar, bars_for, findings

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


class FalseClock:
    """Counts a microsecond for each call, after running the first one."""

    def prepare(self, calls):
        calls[0]()
        return calls

    def seconds(self, prepared) -> float:
        return 1e-6 * len(prepared)


def measurement(op="w4a16", m=1, n=8192, k=8192, ours=1.0, fp16=3.0, library=2.0, correct=True):
    seconds = {"ours": ours, "fp16": fp16, "library": library, "bf16": fp16}
    samples = {name: Samples(value, value, value) for name, value in seconds.items()}
    return Measurement(op, m, n, k, 128, 1e-4, correct, samples, 0.5, None)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch) -> None:
    monkeypatch.setattr("torchlathe.tools.kernels.layers._MOST", 2)


def test_copies_are_past_the_cache(monkeypatch) -> None:
    monkeypatch.setattr("torchlathe.tools.kernels.layers._MOST", 64)
    assert copies_for(4096 * 4096 // 2) == 23
    assert copies_for(14336 * 4096 * 2) == 2
    assert copies_for(1) == 64


def test_quantiles() -> None:
    assert Samples.of([5, 1, 4, 2, 3]) == Samples(3, 2, 4)
    assert Samples.of([7]) == Samples(7, 7, 7)


def test_contestants_take_turns() -> None:
    order = []

    class Noting(FalseClock):
        def seconds(self, prepared) -> float:
            order.append(len(prepared))
            return super().seconds(prepared)

    calls = {"a": [lambda: torch.zeros(())], "b": [lambda: torch.zeros(())] * 2}
    found = time_in_turn(calls, Noting(), 3)
    assert order == [1, 2, 1, 2, 1, 2]
    assert found["a"].median == found["b"].median == pytest.approx(1e-6)


def test_floor() -> None:
    ceilings = Ceilings(4e12, 8e14)
    assert ceilings.floor(4e6, 0, False) == pytest.approx(1e-6)
    assert ceilings.floor(0, 8e9, False) == pytest.approx(1e-5)
    assert ceilings.floor(0, 8e9, True) == pytest.approx(5e-6)


@pytest.mark.parametrize("op", LAYERS)
def test_layers_are_right(op: str) -> None:
    layer = make_layer(op, 3, 100, 200, CPU)
    assert len(layer.ours.calls) == len(layer.library.calls) == 2
    ours, library = layer.ours.calls[0](), layer.library.calls[0]()
    wanted = layer.wanted()
    # Both are rounded to the type of the result.
    for found in (ours, library):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 4e-3


def test_bench() -> None:
    rows = list(bench(CPU, FalseClock(), shapes=[(64, 128)], tokens=[1, 3], rounds=2))
    assert [(row.op, row.m) for row in rows] == [(op, m) for m in (1, 3) for op in LAYERS]
    assert all(row.correct for row in rows)
    data = json.loads(json.dumps(rows[0].as_dict()))
    assert data["ratios"] == {"fp16": 1.0, "bf16": 1.0, "library": 1.0}
    assert set(data["seconds"]) == {"ours", "library", "fp16", "bf16"}


def test_a_deadline_ends_it() -> None:
    assert list(bench(CPU, FalseClock(), shapes=[(64, 128)], tokens=[1], deadline=0.0)) == []


def test_bars() -> None:
    assert [bar.least for bar in bars_for(measurement())] == [2.4, 0.95]
    assert [bar.least for bar in bars_for(measurement(n=4096, k=4096))] == [1.7, 0.95]
    many = [(bar.other, bar.least) for bar in bars_for(measurement(m=256))]
    assert many == [("fp16", 0.85), ("library", 0.95)]
    assert [bar.other for bar in bars_for(measurement(op="fp8", m=256))] == ["library"]
    found = findings([measurement(), measurement(ours=2.0), measurement(correct=False)])
    assert [finding.holds for finding in found] == [True, True, False, True, False, False]
    assert str(found[2]) == "w4a16 8192x8192 M=1: 1.50x fp16, the bar is 2.4x: MISSED"
    assert "WRONG RESULT" in str(found[4])


def test_a_rival_is_timed_where_its_result_is_right(monkeypatch, caplog) -> None:
    layer = make_layer("w4a16", 3, 64, 128, CPU)
    assert layer.rivals == {}  # GemLite is timed on a GPU alone

    def fails() -> torch.Tensor:
        raise RuntimeError("no kernel image")

    rivals = {
        "gemlite": layer.ours,
        "wrong": replace(layer.ours, calls=(lambda: 1.1 * layer.ours.calls[0](),) * 2),
        "failing": replace(layer.ours, calls=(fails,) * 2),
    }
    monkeypatch.setitem(LAYERS, "w4a16", lambda *_: replace(layer, rivals=rivals))
    row = next(bench(CPU, FalseClock(), ops=["w4a16"], shapes=[(64, 128)], tokens=[3], rounds=2))
    assert set(row.seconds) == {"ours", "library", "fp16", "bf16", "gemlite"}
    assert "wrong has an error of 0.1" in caplog.text
    assert "failing fails" in caplog.text
    assert Bar("gemlite", 1.5) in list(bars_for(row))


def test_gemlites_layer(monkeypatch, caplog) -> None:
    """Its layout is one scale and zero point for each group of each row, row by row."""

    class Layer:
        def __init__(self, bits, **options) -> None:
            self.bits, self.options = bits, options

        def pack(self, values, scales, zeros, bias) -> None:
            groups = self.options["in_features"] // self.options["group_size"]
            rows = values.view(len(values), groups, -1).float()
            each = [of.view(len(values), groups, 1).float() for of in (scales, zeros)]
            self.weight = ((rows - each[1]) * each[0]).flatten(1)

        def __call__(self, x):
            return (x.float() @ self.weight.T).half()

    core: Any = types.ModuleType("gemlite.core")
    core.DType = types.SimpleNamespace(FP16="fp16")
    core.GemLiteLinear = Layer
    monkeypatch.setitem(sys.modules, "gemlite", types.ModuleType("gemlite"))
    monkeypatch.setitem(sys.modules, "gemlite.core", core)
    values = torch.randint(0, 16, (24, 256), dtype=torch.uint8)
    scales, x = torch.rand(2, 24).half(), torch.randn(3, 256).half()
    call = gemlite_layer(values, scales, 128)
    assert call is not None
    ours = w4a16.pack(values, scales, None, 128)
    wanted = w4a16.reference(x, *ours, out_features=24, group=128)
    assert (call(x) - wanted).norm() < 1e-3 * wanted.norm()
    core.GemLiteLinear = None
    assert gemlite_layer(values, scales, 128) is None
    assert "GemLite is left out: TypeError" in caplog.text


def test_tuning_keeps_the_fastest_and_drops_what_fails(tmp_path, monkeypatch, caplog) -> None:
    table = TileTable("false", "3.6.0", tmp_path)
    tried = []

    def error_of(layer) -> float:
        tile = table.entries[layer.problem.key]
        assert tile is not None
        tried.append(tile)
        if tile.stages == 3:
            raise RuntimeError("out of resources")
        return 1.0 if tile.BN == 128 and layer.problem.bucket == 2 else 0.0

    class Preferring(FalseClock):
        def seconds(self, prepared) -> float:
            tile = tried[-1] if tried else None
            return 1.0 if tile is None else 0.1 * (1 if tile.BM == 16 else tile.BM)

    monkeypatch.setattr(tuning, "error_of", error_of)
    done = tuning.tune(CPU, Preferring(), table, processors=132, ops=["w4a16"], shapes=[(64, 128)])
    assert done == len(BUCKETS)
    assert all(tile.stages == 4 for tile in table.entries.values() if tile is not None)
    assert "out of resources" in caplog.text
    assert "has an error of 1" in caplog.text
    assert TileTable("false", "3.6.0", tmp_path).entries == table.entries


def test_the_whole_check_on_a_cpu(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checked, "_EDGES", [(3, 40, 128)])
    monkeypatch.setattr(checked, "_FEWER_EDGES", [(3, 40, 128)])
    table = TileTable("false", "3.6.0", tmp_path)
    setting = checked.Setting(CPU, FalseClock(), table, 132, [(64, 128)], [1], 64, 2)
    names = [part.name for part in checked.parts()]
    rows = [row for name in names for row in checked.run_part(name, setting, 120.0)]
    result = gpu_check.result_of(rows)
    assert {row["op"] for row in result["correct"]} == {*LAYERS, *FURTHER}
    assert not result["wrong"]
    assert len(result["tuned"]) == len(BUCKETS) * len(LAYERS)
    assert {row["m"] for row in result["compiled"]} == set(BUCKETS)
    assert len(result["measurements"]) == len(LAYERS)
    texts = [bar["text"] for bar in result["bars"]]
    for part in ("w4a16 experts", "w8a16 experts", "w8a8 gated", "block_sparse 128", "low_rank 64"):
        assert any(part in line for line in texts)
    assert any("copy bandwidth" in line for line in result["verdict"])
    assert not result["good"]  # nothing is faster than anything by this clock
    assert any(line.startswith("MISSED") for line in result["verdict"])
    # A bar has one line, whatever it was held to.
    assert len(set(result["verdict"])) == len(result["verdict"]) < len(texts)
    json.dumps(result)


def test_a_kernel_that_fails_costs_a_row(tmp_path, monkeypatch) -> None:
    def fails(m, n, k, device):
        raise RuntimeError("out of resources: shared memory")

    monkeypatch.setitem(FURTHER, "low_rank", fails)
    setting = checked.Setting(CPU, FalseClock(), TileTable("false", "3.6.0", tmp_path), 132)
    rows = list(checked.run_part("correct:low_rank", setting, 60.0))
    assert len(rows) == 4
    result = gpu_check.result_of(rows, missing=["time:w4a16"])
    assert not result["good"]
    told = gpu_check._told(result)
    assert "out of resources: shared memory" in told[0]
    assert "NOT RUN time:w4a16" in told


JOBS = {
    "good": ("print(1)", None),
    "raises": ("raise ValueError('three')", "ValueError: three"),
    "crashes": ("os.abort()", "SIGABRT"),
    "hangs": ("time.sleep(60)", "stopped after"),
}


@pytest.mark.parametrize("how", JOBS)
def test_a_part_that_ends_badly_keeps_its_rows(tmp_path, how: str) -> None:
    code, said = JOBS[how]
    path = tmp_path / Job.file_of(f"one:{how}")
    code = (
        "import os, sys, time\n"
        f"file = open({str(path)!r}, 'w')\n"
        'file.write(\'{"kind": "tuned"}\\n{"kind": \'); file.flush()\n'
        f"{code}\n"
    )
    ended: list[Job] = []
    seconds = 1.0 if how == "hangs" else 60.0
    run_alone(Job(f"one:{how}", [sys.executable, "-c", code], tmp_path, seconds), ended.append)
    # The second row was not whole.
    assert ended[0].rows() == [{"kind": "tuned"}]
    failure = ended[0].failure()
    assert failure is None if said is None else said in str(failure)


def test_what_waits_at_the_end_does_not_begin(tmp_path) -> None:
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    jobs = [Job(f"job:{i}", words, tmp_path, 60.0) for i in range(3)]
    ended: list[str] = []
    run_together(jobs, time.monotonic() + 0.5, 2, lambda job: ended.append(job.name))
    assert sorted(ended) == ["job:0", "job:1"]
    assert all(job.failure() is not None for job in jobs[:2])


def test_rehearsal(tmp_path, capsys) -> None:
    """The whole way through processes and files, for one part, and one that crashes."""
    path = tmp_path / "found.json"
    words = ["--rehearse", "-o", str(path), "--only", "correct:low_rank"]
    assert gpu_check.main([*words, "--sabotage", "correct:low_rank=crash"]) == 1
    found = json.loads(path.read_text())
    assert len(found["correct"]) == 1
    assert found["failures"] == ["correct:low_rank: SIGABRT: "]
    assert found["not_run"] == []
    assert "FAILED correct:low_rank: SIGABRT" in capsys.readouterr().out


@pytest.mark.slow
def test_rehearsal_of_everything(tmp_path) -> None:
    path = tmp_path / "found.json"
    gpu_check.main(["--rehearse", "-o", str(path), "--seconds", "1500", "--jobs", "2"])
    found = json.loads(path.read_text())
    assert found["failures"] == found["not_run"] == found["wrong"] == []
    assert {row["op"] for row in found["correct"]} == {*LAYERS, *FURTHER}


def test_parts_are_named(capsys) -> None:
    assert gpu_check.main(["--list", "--only", "tune,time:w4a16"]) == 0
    found = capsys.readouterr().out.split()
    assert "tune:w8a8" in found
    assert "time:w4a16" in found
    assert "time:w8a8" not in found


@NO_GPU
def test_without_a_gpu_it_is_refused(capsys) -> None:
    with pytest.raises(UnsupportedError, match="need a CUDA device"):
        require_gpu()
    for command in ("tune", "bench"):
        assert main(["kernels", command]) == 2
        assert "`torchlathe kernels check` needs no GPU" in capsys.readouterr().err
    assert gpu_check.main([]) == 2
    assert "need a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kernels", "a subcommand is missing"),
        ("kernels chekc", "unknown command 'chekc'"),
        ("kernels check --arch sm_91", "unknown value 'sm_91' for --arch"),
        ("kernels check --op w4a61", "unknown op 'w4a61'"),
        ("kernels bench --op w4", "unknown op 'w4'"),
        ("kernels bench --shape 4096", "--shape takes positive integers, not ''"),
        ("kernels bench --tokens 1,x", "--tokens takes positive integers, not 'x'"),
        ("kernels bench --rounds 0", "--rounds must be at least 1"),
        ("kernels check --triton /nowhere-at-all --op norm_quantise", "no Triton"),
    ],
)
def test_wrong_usage(line: str, message: str, capsys, monkeypatch) -> None:
    if "--triton" in line:
        monkeypatch.setitem(sys.modules, "triton", None)
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["kernels"], *(["kernels", a] for a in ("check", "tune", "bench"))]
)
def test_help_has_examples(words, capsys) -> None:
    assert main([*words, "--help"]) == 0
    assert "examples:\n  torchlathe kernels" in capsys.readouterr().out


def test_it_needs_nothing_but_torch() -> None:
    """A bare machine has torch and Triton, and none of the other dependencies."""
    missing = ["scipy", "rich", "jinja2", "matplotlib", "safetensors", "transformers"]
    code = (
        "import sys\n"
        f"for name in {missing!r}: sys.modules[name] = None\n"
        "import torchlathe.tools.kernels.gpu_check\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_the_results() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page_with_table(text) == text
    with pytest.raises(ValueError, match="no mark"):
        page.page_with_table("# Kernels\n")


def test_the_results_are_of_the_kernels_that_there_are() -> None:
    """A case that was added or renamed shows as a table that is out of date."""
    data = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    kept = {(row["op"], row["config"], row["arch"]) for row in data["rows"]}
    known = {(c.op, c.config, arch) for c in all_cases() for arch in c.architectures}
    assert kept == known
    assert data["triton"] == PINNED
    assert not any(row["problems"] or row["stack"] for row in data["rows"])
    assert all(row["problems"] for row in data["control"])
