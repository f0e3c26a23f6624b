"""Matrices in files, and runs that are killed and go on."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import ArtifactError, InputError, OptionError, PreconditionError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import (
    Accumulator,
    Calibration,
    Counts,
    Moments,
    Reservoir,
    Watch,
    collect,
    collect_gradients,
    collect_layers,
    saving,
)
from torchlathe.passes.statistics.readers import readers_of
from torchlathe.passes.statistics.saving import batch_digest
from torchlathe.passes.statistics.storage import MatrixStore
from torchlathe.passes.statistics.telling import callable_text


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def loss(outputs: Tensor, batch: Tensor) -> Tensor:
    return (outputs - batch[:, :3]).square().sum(1).mean()


def made(batches: int = 6) -> tuple[Program, list[Tensor]]:
    torch.manual_seed(1)
    data = [torch.randn(5, 6) for _ in range(batches)]
    return tl.capture(Net().eval(), (data[0],)), data


def context(program: Program, data: Any, said: list[str] | None = None) -> PassContext:
    progress = None if said is None else said.append
    return PassContext(program, "test", calibration=data, loss=loss, progress=progress)


def matrices(found: Any) -> list[Tensor]:
    return [m.second for layer in found.values() for m in (layer.inputs, layer.outputs)]


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_spilled_matrices_are_the_same_and_leave_no_file(tmp_path: Path, dtype: Any) -> None:
    program, data = made()
    folder = tmp_path / "made" / "by it"
    said: list[str] = []
    plain = collect_layers(program, context(program, data), gradients=True, dtype=dtype)
    spilled = collect_layers(
        program,
        context(program, data, said),
        gradients=True,
        dtype=dtype,
        limit_bytes=1000,
        spill=folder,
    )
    for a, b in zip(matrices(plain), matrices(spilled), strict=True):
        assert torch.equal(a, b)
    assert list(folder.iterdir()) == []
    assert said[0] == "statistics: batch 1 of 6"
    assert "of matrices in files" in said[-1]


def test_store_keeps_to_its_limit(tmp_path: Path) -> None:
    store = MatrixStore(1000, tmp_path)
    cpu = torch.device("cpu")
    kept = [store.zeros((10, 10), torch.float32, cpu) for _ in range(4)]
    assert (store.held_bytes, store.spilled_bytes) == (800, 800)
    small = store.zeros((5, 10), torch.float32, cpu)  # there is room for this one
    assert (store.held_bytes, store.spilled_bytes) == (1000, 800)
    del store
    for number, tensor in enumerate([*kept, small]):
        assert not tensor.any()
        tensor += number
        assert float(tensor.sum()) == number * tensor.numel()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    store = MatrixStore(0, tmp_path)
    with pytest.raises(InputError, match="cannot be spilled: No space left"):
        store.zeros((10, 10), torch.float64, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


# -- going on --------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Stops:
    """Batches that end in an error after so many."""

    def __init__(self, data: list[Tensor], after: int) -> None:
        self.data, self.after = data, after

    def __iter__(self) -> Any:
        yield from self.data[: self.after]
        raise Interrupted


def everything(program: Program) -> list[Watch]:
    nodes = {n.name: n for n in program.nodes}
    relu, last = nodes["relu"], nodes["linear_2"]
    return [
        Watch.axis(relu, 1, matrix=True),
        Watch.axis(last, 1, matrix=True, gradient=True),
        Watch.axis(relu, 1, into=Reservoir(7, seed=2)),
        Watch(last, _winners, into=Counts(3)),
    ]


def _winners(value: Tensor) -> Tensor:
    return value.argmax(1)


def states(watches: Any, found: Any) -> list[Tensor]:
    return [t for w in watches for t in found[w].state().values()]


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "in files"])
def test_an_interrupted_run_goes_on_bit_by_bit(tmp_path: Path, limit: Any) -> None:
    program, data = made()
    options: dict[str, Any] = {"resume": tmp_path, "save_every": 2, "limit_bytes": limit}
    whole = everything(program)
    want = states(whole, collect(program, context(program, data), whole))
    with pytest.raises(Interrupted):
        collect(program, context(program, Stops(data, 5)), everything(program), **options)
    (file,) = tmp_path.iterdir()
    said: list[str] = []
    again = everything(program)
    got = states(again, collect(program, context(program, data, said), again, **options))
    assert [s.rpartition("statistics: ")[2].split(" (")[0] for s in said] == [
        "batch 1 was seen before",
        "batch 2 was seen before",
        "batch 3 was seen before",
        "batch 4 was seen before",
        "batch 5 of 6",
        "batch 6 of 6",
    ]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    # A finished run is found again, and goes on with more data.
    last = everything(program)
    said.clear()
    got = states(last, collect(program, context(program, data, said), last, **options))
    assert all("seen before" in text for text in said)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_of_an_interrupted_run_go_on(tmp_path: Path, per_sample: bool) -> None:
    torch.manual_seed(1)
    data = [torch.randn(5, 6) for _ in range(4)]
    program = tl.capture(Net().eval(), (data[0],), dynamic_shapes="auto")
    options: dict[str, Any] = {"resume": tmp_path, "save_every": 1, "limit_bytes": 0}
    want = collect_gradients(program, context(program, data), per_sample=per_sample)
    ctx = context(program, Stops(data, 3))
    with pytest.raises(Interrupted):
        collect_gradients(program, ctx, per_sample=per_sample, **options)
    said: list[str] = []
    ctx = context(program, data, said)
    got = collect_gradients(program, ctx, per_sample=per_sample, **options)
    assert said[2] == "gradients: batch 3 was seen before"
    assert said[3].startswith("gradients: batch 4 of 4 (")
    assert want.keys() == got.keys()
    for name, moments in want.items():
        assert moments.count == got[name].count == (20 if per_sample else 4)
        assert torch.equal(moments.total, got[name].total)
        assert torch.equal(moments.squares, got[name].squares)


def test_the_state_belongs_to_a_program_and_to_what_is_watched(tmp_path: Path) -> None:
    program, data = made()
    ctx = context(program, data)
    collect_layers(program, ctx, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    collect_layers(program, ctx, resume=tmp_path, gradients=True)
    collect_layers(program, ctx, resume=tmp_path, dtype=torch.float32)
    other = Net().eval()
    with torch.no_grad():
        other.b.weight[0, 0] += 1
    collect_layers(tl.capture(other, (data[0],)), ctx, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    collect_layers(made()[0], ctx, resume=tmp_path)  # captured anew, and the same
    assert len(list(tmp_path.iterdir())) == 4


def test_the_state_belongs_to_a_loss(tmp_path: Path) -> None:
    program, data = made()

    def half(outputs: Tensor, batch: Tensor) -> Tensor:
        return loss(outputs, batch) / 2

    for given in (loss, half, lambda outputs, batch: loss(outputs, batch) / 3):
        ctx = PassContext(program, "test", calibration=data, loss=given)
        collect_layers(program, ctx, gradients=True, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    ctx = PassContext(program, "test", calibration=data, loss=loss)
    collect_layers(program, ctx, resume=tmp_path)  # which needs none
    collect_layers(program, context(program, data), resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_settings_that_come_with_the_batches(tmp_path: Path) -> None:
    program, data = made()
    said: list[str] = []
    batches = Calibration(
        iter(data),
        limit_bytes=0,
        resume=tmp_path,
        save_every=4,
        samples=lambda batch: 10 * len(batch),
    )
    assert [b is d for b, d in zip(batches, data, strict=True)] == [True] * 6
    found = collect_layers(program, context(program, batches, said), gradients=True)
    assert said[-1].startswith("statistics: batch 6 of 6")
    assert "in files" in said[-1]
    assert len(list(tmp_path.iterdir())) == 1
    plain = collect_layers(program, context(program, data), gradients=True)
    for node, moments in found.items():
        assert moments.outputs is not None
        assert moments.outputs.count == 300
        want = plain[node].outputs
        assert want is not None
        # Gradients in float32, times another number.
        torch.testing.assert_close(
            moments.outputs.second, 10 * want.second, rtol=1e-5, atol=1e-5, check_dtype=False
        )
    # What a call says itself counts more.
    collect_layers(program, context(program, batches, said), limit_bytes=10**6, save_every=1)
    assert "in files" not in said[-1]
    small = tl.compile(
        Net(),
        "structured-erase{sparsity=0.3,importance=wanda}",
        (data[0],),
        calibration=batches,
        measure_latency=False,
    )
    assert small.report.passes[0]["changed"]
    wrong: Any
    for wrong in ({"limit_bytes": -1}, {"save_every": 0}):
        with pytest.raises(OptionError):
            Calibration(data, **wrong)
    with pytest.raises(InputError, match="must be batches, got int"):
        Calibration(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "in files"])
def test_values_of_several_nodes_go_on(tmp_path: Path, limit: Any) -> None:
    program, data = made()
    nodes = {n.name: n for n in program.nodes}
    before, after = nodes["linear"], nodes["relu"]

    def watch() -> Watch:
        return Watch(after, _both, matrix=True, beside=(before, program.input_nodes[0]))

    options: dict[str, Any] = {"resume": tmp_path, "save_every": 1, "limit_bytes": limit}
    first, second, plain = watch(), watch(), watch()
    with pytest.raises(Interrupted):
        collect(program, context(program, Stops(data, 4)), [first], **options)
    got = collect(program, context(program, data), [second], **options)[second]
    want = collect(program, context(program, data), [plain])[plain]
    assert isinstance(got, Moments)
    assert isinstance(want, Moments)
    assert torch.equal(got.second, want.second)
    model = [n.double() for n in (program.tensor("a.weight"), program.tensor("a.bias"))]
    rows = torch.cat(data).double()
    values = rows @ model[0].T + model[1]
    wanted = torch.relu(values) * values + rows.sum(1, keepdim=True)
    # The program computes in float32.
    torch.testing.assert_close(want.mean[0], wanted.mean(0).detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(OptionError, match="no values beside it"):
        Watch(after, _both, gradient=True, beside=(before,))


def _both(after: Tensor, before: Tensor, x: Tensor) -> Tensor:
    return (after * before + x.sum(1, keepdim=True))[None]


def test_other_data_is_refused(tmp_path: Path) -> None:
    program, data = made()
    with pytest.raises(Interrupted):
        collect_layers(program, context(program, Stops(data, 4)), resume=tmp_path, save_every=2)
    for wrong in ([data[1], data[0], *data[2:]], data[:3]):
        with pytest.raises(InputError, match="not that of the interrupted run"):
            collect_layers(program, context(program, wrong), resume=tmp_path)


def test_batches_of_many_kinds_are_told_apart() -> None:
    from collections import UserDict

    class Thing:
        pass

    x = torch.arange(5000.0)
    other = x.clone()
    other[2500] = 0  # in the middle, which texts of tensors leave out
    batches: list[Any] = [
        x,
        other,
        x.double(),
        x.view(50, 100),
        [x, 1],
        [x, 2],
        [x, "a"],
        [x, None],
        x.numpy().astype("int64"),
        other.numpy().astype("int64"),
        UserDict(x=x, y=Thing()),
        UserDict(x=other, y=Thing()),
    ]
    found = [batch_digest("", batch) for batch in batches]
    assert len(set(found)) == len(batches)
    assert found[-1] == batch_digest("", UserDict(x=other, y=Thing()))
    assert batch_digest(found[0], x) != found[0]


def test_a_damaged_state(tmp_path: Path) -> None:
    program, data = made()
    collect_layers(program, context(program, data), resume=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="cannot be read") as caught:
        collect_layers(program, context(program, data), resume=tmp_path)
    assert "delete the file" in str(caught.value)


def test_a_save_that_fails_leaves_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, data = made()
    with pytest.raises(Interrupted):
        collect_layers(program, context(program, Stops(data, 3)), resume=tmp_path, save_every=1)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="cannot be saved: No space left"):
        collect_layers(program, context(program, data), resume=tmp_path, save_every=1)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


def test_what_cannot_be_saved_cannot_be_resumed(tmp_path: Path) -> None:
    class Mine(Accumulator):
        def add(self, rows: Tensor, count: int | None = None) -> None:
            raise AssertionError("the data was read")

    program, data = made()
    watch = Watch.whole(program.input_nodes[0], Mine())
    with pytest.raises(PreconditionError, match=r"Mine of .* cannot be resumed"):
        collect(program, context(program, data), [watch], resume=tmp_path)


def test_the_state_is_a_file_of_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64),
        "b": torch.randn(5).bfloat16(),
        "c": torch.tensor(3),
        "d": torch.arange(3, dtype=torch.uint8),
        "e": torch.zeros(0, 2),
        "f": torch.tensor([True]),
    }
    saving._write(tmp_path / "x", tensors, {"about": "this"})
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)


CHILD = """
import sys
import torch
from torch import nn
import torchlathe as tl
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import collect_layers
from tests.passes.test_statistics_resume import loss, made

torch.set_num_threads(1)
program, data = made(12)

class Batches:
    def __iter__(self):
        for number, batch in enumerate(data):
            if number == 8 and sys.argv[2] == "wait":
                print("waiting", flush=True)
                sys.stdin.read()  # until the process is killed
            yield batch

said = []
ctx = PassContext(program, "test", calibration=Batches(), loss=loss, progress=said.append)
collect_layers(program, ctx, gradients=True, resume=sys.argv[1], save_every=3)
print(sum("seen before" in text for text in said))
"""


def test_a_killed_process_is_gone_on_from(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path)]
    root = Path(__file__).parents[2]
    first = subprocess.Popen(
        [*command, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "waiting\n"
    first.kill()
    first.wait()
    for stream in (first.stdin, first.stdout):
        assert stream is not None
        stream.close()
    assert len(list(tmp_path.iterdir())) == 1
    second = subprocess.run([*command, "go"], check=True, capture_output=True, text=True, cwd=root)
    assert second.stdout == "6\n"
    program, data = made(12)
    want = collect_layers(program, context(program, data), gradients=True)
    said: list[str] = []
    got = collect_layers(program, context(program, data, said), gradients=True, resume=tmp_path)
    assert all("seen before" in text for text in said)  # what the child saved serves here too
    for a, b in zip(matrices(want), matrices(got), strict=True):
        # Float32 values that another process may add up in another order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


RESTLESS = """
import sys
import torch
import torchlathe as tl
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import collect_layers
from tests.passes.test_statistics_resume import loss, wide

torch.set_num_threads(1)
program, data = wide()
print("begun", flush=True)
ctx = PassContext(program, "test", calibration=data, loss=loss)
collect_layers(program, ctx, gradients=True, resume=sys.argv[1], save_every=1)
"""


def wide() -> tuple[Program, list[Tensor]]:
    """States of 50 MB, so that most of the time goes into saving them."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 1500), nn.ReLU(), nn.Linear(1500, 3)).eval()
    data = [torch.randn(5, 6) for _ in range(30)]
    return tl.capture(model, (data[0],)), data


@pytest.mark.slow
def test_processes_that_are_killed_while_they_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESTLESS, str(tmp_path)]
    root = Path(__file__).parents[2]
    for milliseconds in (70, 200, 330, 450, 610):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(milliseconds / 1000)
        process.kill()
        process.wait()
        process.stdout.close()
    program, data = wide()
    said: list[str] = []
    want = collect_layers(program, context(program, data), gradients=True)
    got = collect_layers(program, context(program, data, said), gradients=True, resume=tmp_path)
    assert any("seen before" in text for text in said)
    for a, b in zip(matrices(want), matrices(got), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_restored_moments_go_on() -> None:
    rows = torch.randn(2, 30, 4)
    whole, first, second = Moments(matrix=True), Moments(matrix=True), Moments(matrix=True)
    whole.add(rows[:, :20])
    whole.add(rows[:, 20:])
    first.add(rows[:, :20])
    second.restore(first.state())
    second.add(rows[:, 20:])
    assert torch.equal(whole.second, second.second)
    assert torch.equal(whole.variance, second.variance)
    assert float(first.count) == 20


class Strides(nn.Module):
    """Two convolutions of one kernel size that read one value at other places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


def test_the_state_belongs_to_the_layers_that_were_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    program = tl.capture(Strides().eval(), (x,))
    ctx = PassContext(program, "test", calibration=[x])
    one, other = readers_of(program).values()
    collect_layers(program, ctx, [one], resume=tmp_path)
    found = collect_layers(program, ctx, [other], resume=tmp_path)[other.node].inputs
    alone = collect_layers(program, ctx, [other])[other.node].inputs
    assert found.count == alone.count
    assert torch.equal(found.second, alone.second)


def test_the_state_belongs_to_accumulators_of_one_kind(tmp_path: Path) -> None:
    program, data = made()
    ctx = PassContext(program, "test", calibration=data)
    node = next(n for n in program.nodes if n.name == "linear")
    for into in (Reservoir(5, seed=0), Reservoir(3, seed=0), Reservoir(3, seed=1)):
        watch = Watch.axis(node, -1, into=into)
        collect(program, ctx, [watch], resume=tmp_path)
        alone = Reservoir(into.size, seed=into.seed)
        collect(program, ctx, [Watch.axis(node, -1, into=alone)])
        assert torch.equal(into.rows, alone.rows)
    for extent in (4, 6):
        counts = Counts(extent)
        collect(program, ctx, [Watch(node, lambda x: x.argmax(-1), into=counts)], resume=tmp_path)
        assert counts.values.shape == (extent,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.sum((0, 1)), lambda x: x.sum((0, 2))),
        (lambda x: (lambda y: y * 2)(x), lambda x: (lambda y: y * 3)(x)),
        (lambda x: x in {1, 2}, lambda x: x in {1, 3}),
        (partial(torch.sum, dim=0), partial(torch.sum, dim=1)),
        (partial(torch.add, 1), partial(torch.add, 2)),
    ],
    ids=["tuples", "functions inside", "sets", "keywords", "arguments"],
)
def test_functions_are_told_apart_by_their_code(one: Any, other: Any) -> None:
    assert callable_text(one) != callable_text(other)


SAVING = """
import sys
from pathlib import Path
import torch
from torchlathe.passes.statistics import Moments
from torchlathe.passes.statistics.saving import StateFile

value = float(sys.argv[2])
moments = Moments(matrix=True)
moments.add(torch.full((1, 4, 400), value))
state = StateFile(Path(sys.argv[1]))
for _ in range(30):
    state.save({"a": moments}, 5, sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_that_save_one_state_do_not_mix_them(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    root = Path(__file__).parents[2]
    commands = [[sys.executable, "-c", SAVING, str(path), value] for value in ("1", "2")]
    processes = [subprocess.Popen(command, cwd=root) for command in commands]
    while any(process.poll() is None for process in processes):
        moments, state = Moments(matrix=True), saving.StateFile(path)
        state.load({"a": moments}, torch.device("cpu")) if path.exists() else None
        if state.seen:
            assert moments.products is not None
            assert bool((moments.products == 4 * float(state.digest) ** 2).all())
    assert [process.returncode for process in processes] == [0, 0]
    assert [left.name for left in tmp_path.iterdir()] == [path.name]
