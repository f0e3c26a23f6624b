"""The latency table and the search under a latency budget, on a clock that counts instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchlathe as tl
from tests.passes.erase_models import program
from torchlathe.ir import PreconditionError, Program
from torchlathe.ir.cost.latency import LatencyTable, cache_directory
from torchlathe.ir.cost.roofline import NOMINAL
from torchlathe.ir.cost.timing import samples
from torchlathe.passes import PassManager, StructuredErase


class Counting(TorchDispatchMode):
    """Work takes a microsecond per op, and a nanosecond (or so) per element read or written."""

    def __init__(self, per_element: float = 1e-9) -> None:
        super().__init__()
        self.per_element = per_element
        self.seconds = 0.0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(t)]
        self.seconds += 1e-6 + self.per_element * sum(t.numel() for t in tensors)
        return result

    def __call__(self, work: Callable[[], object]) -> float:
        before = self.seconds
        self.calls += 1
        with self:
            work()
        return self.seconds - before


# The models are so small that ops would take longer than their elements, which never go.
SLOW = 1e-7


def whole(of: Program, per_element: float = SLOW) -> float:
    (seconds,) = LatencyTable(timer=Counting(per_element)).whole(of)
    return seconds


# -- the table -------------------------------------------------------------------------------


def test_each_op_is_measured_once() -> None:
    table = LatencyTable(timer=Counting())
    first = table.program(program("resnet18"))
    assert first.estimated == 0
    assert table.measurements == len(table.entries) < first.measured  # blocks repeat
    again = table.program(program("resnet18"))
    assert again == first
    assert table.measurements == len(table.entries)
    # On this clock the whole is exactly the sum of its parts.
    assert first.seconds == pytest.approx(whole(program("resnet18"), 1e-9), rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "bert", "gates"])
def test_ops_of_dynamic_programs(name: str) -> None:
    found = LatencyTable(timer=Counting()).program(program(name))
    assert found.measured >= 0.9 * len(found.nodes)
    assert found.seconds > 0


def test_without_measuring_it_is_estimated() -> None:
    timer = Counting()
    table = LatencyTable(timer=timer, measure=False)
    found = table.program(program("resnet18"))
    assert timer.calls == 0
    assert table.peaks == NOMINAL
    assert found.measured == 0
    wide = LatencyTable(timer=timer, measure=False).program(
        tl.capture(nn.Linear(64, 4096).eval(), (torch.randn(512, 64),))
    )
    # 512 x 64 x 4096 multiplications and additions, and as little else as the two matrices.
    assert wide.seconds == pytest.approx(2 * 512 * 64 * 4096 / NOMINAL.flops, rel=0.05)


def test_it_is_kept_on_disk(tmp_path: Path) -> None:
    one = LatencyTable(timer=Counting(), directory=tmp_path)
    found = one.program(program("gates"))
    assert one.path is not None
    assert [p.name for p in one.path.parent.iterdir()] == [one.path.name]  # no draft is left
    two = LatencyTable(timer=Counting(), directory=tmp_path)
    assert two.program(program("gates")) == found
    assert two.measurements == 0
    # Another writer's entries are kept.
    text = json.loads(one.path.read_text())
    assert {"torch", "processor", "threads", "seconds"} <= text.keys()
    text["seconds"]["other"] = 1.0
    one.path.write_text(json.dumps(text))
    two.save()
    assert json.loads(one.path.read_text())["seconds"]["other"] == 1.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace(torch.__version__, "0.1"),
        lambda text: json.dumps({**json.loads(text), "seconds": {"x": "fast"}}),
    ],
    ids=["truncated", "list", "format", "version", "text"],
)
def test_a_damaged_file_is_as_none(tmp_path: Path, damage: Callable[[str], str]) -> None:
    one = LatencyTable(timer=Counting(), directory=tmp_path)
    one.program(program("attention"))
    assert one.path is not None
    one.path.write_text(damage(one.path.read_text()))
    assert not LatencyTable(timer=Counting(), directory=tmp_path).entries


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "latency").write_text("in the way")
    assert LatencyTable(timer=Counting(), directory=tmp_path).program(program("attention")).seconds


def test_the_number_of_threads_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = LatencyTable(directory=tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert LatencyTable(directory=tmp_path).path != one.path


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("TORCHLATHE_CACHE", raising=False)
    assert cache_directory() == Path("/somewhere/torchlathe")
    monkeypatch.setenv("TORCHLATHE_CACHE", "/elsewhere")
    assert cache_directory() == Path("/elsewhere")
    monkeypatch.delenv("TORCHLATHE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "torchlathe"


def test_samples_are_taken_in_turn_and_capped() -> None:
    order: list[str] = []

    def timer(work: Callable[[], object]) -> float:
        work()
        return 1.0 if order[-1] == "slow" else 0.1

    works = [lambda: order.append("slow"), lambda: order.append("quick")]
    found = samples(works, timer, rounds=4, cap=0.35)
    assert order[:6] == ["slow", "quick"] * 2 + ["quick"] * 2  # the first round warms up
    assert [len(taken) for taken in found] == [1, 4]


# -- the budget ------------------------------------------------------------------------------


def erase(name: str, table: LatencyTable, **options: Any) -> Program:
    made = StructuredErase(latency_table=table, **options)
    return PassManager([made], verify="fast").run(program(name))


@pytest.mark.parametrize("scope", ["global", "local", "isomorphic"])
@pytest.mark.parametrize("name", ["resnet18", "attention"])
def test_a_latency_budget_holds(name: str, scope: str) -> None:
    before = whole(program(name))
    after = erase(name, LatencyTable(timer=Counting(SLOW)), latency=0.7, scope=scope)
    record = after.history[-1]
    assert record.verification["passed"]
    # The search tells candidates apart to 1/256 of the way, and is content within 5 % below.
    assert 0.6 * before < whole(after) <= 0.72 * before
    statistics = record.statistics
    assert statistics["latency_before_ms"] == pytest.approx(before * 1e3)
    assert statistics["latency_measured_ms"] == pytest.approx(whole(after) * 1e3)
    assert statistics["latency_predicted_ms"] > 0
    assert statistics["latency_candidates"] <= 30


def test_absolute_time() -> None:
    before = whole(program("attention"))
    after = erase(
        "attention", LatencyTable(timer=Counting(SLOW)), latency=f"{0.8 * before * 1e6}us"
    )
    assert whole(after) <= 0.82 * before


def test_with_another_budget() -> None:
    before = program("resnet18")
    after = erase("resnet18", LatencyTable(timer=Counting(SLOW)), latency=0.9, flops=0.3)
    assert whole(after) <= 0.9 * whole(before)
    assert 0.25 < after.cost().flops_at() / before.cost().flops_at() <= 0.3


def test_a_time_that_cannot_be_reached() -> None:
    after = erase("attention", LatencyTable(timer=Counting(SLOW)), latency=0.01)
    assert 0 < whole(after) < whole(program("attention"))
    (warning,) = [d["message"] for d in after.history[-1].diagnostics if d["severity"] == "warning"]
    assert "asked for latency of at most" in warning
    assert "families are at their floor" in warning


def test_erasing_that_does_not_pay() -> None:
    # On a clock that counts ops alone no width is faster, and the norm in the open is slower.
    table = LatencyTable(timer=Counting(0.0))
    after = erase("attention", table, latency=0.9)
    assert not after.history[-1].changed
    assert "asked for latency of at most" in str(after.history[-1].diagnostics)


def test_steps_under_a_latency_budget() -> None:
    before = whole(program("attention"))
    after = erase("attention", LatencyTable(timer=Counting(SLOW)), latency=0.75, steps=2)
    assert whole(after) <= 0.77 * before


def test_an_estimate_says_that_it_is_one() -> None:
    table = LatencyTable(timer=Counting(SLOW), measure=False)
    after = erase("resnet18", table, latency=0.7)
    statistics = after.history[-1].statistics
    assert "latency_measured_ms" not in statistics
    assert statistics["latency_measurements"] == 0
    assert statistics["latency_predicted_ms"] <= 0.7 * statistics["latency_before_ms"] * 1.001
    assert "the latency is an estimate" in str(after.history[-1].diagnostics)


def test_a_program_without_values_can_be_estimated_only() -> None:
    with FakeTensorMode():
        model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(2, 8)
    fake = tl.capture(model.eval(), (x,))
    table = LatencyTable(timer=Counting())
    assert table.program(fake).measured == 0
    options: dict[str, Any] = {"latency": 0.99, "importance": "random"}
    with pytest.raises(PreconditionError, match="latency asks for values"):
        PassManager([StructuredErase(latency_table=table, **options)]).run(fake)
    table = LatencyTable(timer=Counting(), measure=False)
    after = PassManager([StructuredErase(latency_table=table, **options)]).run(fake)
    assert "the latency is an estimate" in str(after.history[-1].diagnostics)


def test_progress_is_told() -> None:
    told: list[str] = []
    made = StructuredErase(latency=0.8, latency_table=LatencyTable(timer=Counting(SLOW)))
    PassManager([made], verify="off").run(program("attention"), progress=told.append)
    assert "latency: measuring the program and its ops" in told
    assert "latency: candidate 1" in told
