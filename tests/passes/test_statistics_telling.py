"""Functions as text: alike in each process, and others wherever they compute something else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlathe.passes.statistics.telling import callable_text

SCALE = 2.0


def helper(x: Tensor) -> Tensor:
    return x * SCALE


def by_globals(outputs: Tensor, batch: Any) -> Tensor:
    return helper(outputs).mean()


def closing(over: Any, kind: str = "a") -> Callable[[Any], Any]:
    def loss(outputs: Any, *, names: Any = frozenset({"one", "two", "three"})) -> Any:
        return outputs, over, kind, names

    return loss


@dataclass
class Options:
    rate: float
    of: object = None


class Focal:
    """A loss that is an object."""

    def __init__(self, gamma: float, weight: Tensor | None = None) -> None:
        self.gamma, self.weight, self.thing = gamma, weight, object()
        self.own = self.scaled  # refers back to the object

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.scaled(outputs)

    def scaled(self, outputs: Tensor) -> Tensor:
        return outputs.mean() * self.gamma


def critic(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.CrossEntropyLoss())


def recursive() -> Callable[[int], int]:
    def again(count: int) -> int:
        return again(count - 1) if count else 0

    return again


def every() -> dict[str, Any]:
    """Functions that differ from each other, made anew."""
    x = torch.arange(6.0)
    return {
        "none": None,
        "plus": lambda o, b: o + b,
        "minus": lambda o, b: o - b,
        "turned": lambda o, b: b - o,
        "one": lambda o, b: o * 1,
        "two": lambda o, b: o * 2,
        "globals": by_globals,
        "closure 1": closing(1),
        "closure 1.0": closing(1.0),
        "closure b": closing(1, "b"),
        "closure tensor": closing(x),
        "closure other tensor": closing(-x),
        "closure list": closing([x, {"a": {1, 2}}]),
        "closure other list": closing([x, {"a": {1, 3}}]),
        "closure function": closing(by_globals),
        "closure meta": closing(x.to("meta")),
        "closure options": closing(Options(0.1, object())),
        "closure other options": closing(Options(0.2, object())),
        "closure module": closing(critic(0)),
        "closure other module": closing(critic(1)),
        "closure thing": closing(object()),
        "module": nn.CrossEntropyLoss(),
        "smooth module": nn.CrossEntropyLoss(label_smoothing=0.1),
        "weighed module": nn.CrossEntropyLoss(weight=torch.ones(3)),
        "method": critic(0).forward,
        "object": Focal(1.0),
        "other object": Focal(2.0),
        "weighed object": Focal(1.0, x),
        "method of an object": Focal(1.0).scaled,
        "method of another": Focal(2.0).scaled,
        "partial": partial(F.cross_entropy, label_smoothing=0.1),
        "other partial": partial(F.cross_entropy, label_smoothing=0.2),
        "partial of tensors": partial(F.cross_entropy, weight=x),
        "builtin": torch.sum,
        "other builtin": torch.mean,
        "op": torch.ops.aten.sum.default,
        "other op": torch.ops.aten.mean.default,
        "itself": recursive(),
    }


def texts() -> dict[str, str]:
    return {name: callable_text(function) for name, function in every().items()}


def test_functions_are_told_apart() -> None:
    found = texts()
    assert len(set(found.values())) == len(found)
    assert found == texts()


@pytest.mark.parametrize("name", ["SCALE", "helper"])
def test_what_its_python_module_has_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = callable_text(by_globals)
    value = 3.0 if name == "SCALE" else (lambda x: x / SCALE)
    if name == "helper":
        monkeypatch.setattr(value, "__module__", __name__)
    monkeypatch.setitem(globals(), name, value)
    assert callable_text(by_globals) != before


def test_a_call_changes_nothing() -> None:
    loss = torch.compile(nn.Linear(3, 2), backend="eager")
    op = torch.ops.aten.cumsum.default
    before = [callable_text(loss), callable_text(op)]
    loss(torch.randn(4, 3))
    with torch.device("meta"):
        op(torch.randn(3), 0)
    assert [callable_text(loss), callable_text(op)] == before


def test_other_processes_say_the_same() -> None:
    found = {}
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-m", "tests.passes.test_statistics_telling"],
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        found[seed] = dict(line.split("\t") for line in told.stdout.splitlines())
    assert found["1"] == found["2"] == texts()


if __name__ == "__main__":
    for name, text in texts().items():
        print(name, text, sep="\t")
