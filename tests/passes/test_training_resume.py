"""Trainings that were stopped go on, wherever that was; other trainings begin anew."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchlathe as tl
from tests.passes.sparse_models import classifier
from tests.passes.training_worker import loss as objective
from tests.passes.training_worker import make
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.training import Trainer, TrainingOptions, TrainingResult

torch.set_num_threads(1)  # everything here is small
STEPS = 15


class Stopped(Exception):
    """Ends a run from its progress, after the state of the step before was saved."""


@functools.cache
def tied() -> tuple[tl.Program, list[Any]]:
    """Seven batches to train on, and one to evaluate on."""
    return make("tied")


def train(accumulate: int, every: int, folder: Path | None, stop: int = 0) -> TrainingResult:
    program, batches = tied()

    def say(text: str) -> None:
        if stop and text.startswith(f"step {stop + 1} of"):
            raise Stopped

    options = TrainingOptions(
        steps=STEPS,
        lr=1e-2,
        accumulate=accumulate,
        evaluate_every=every,
        dropout=True,
        save_every=1,
        checkpoint=None if folder is None else str(folder),
    )
    torch.manual_seed(5)
    ctx = PassContext(program, "test", batches, seed=3, progress=say)
    return Trainer(program, ctx, options, objective=objective).run()


@functools.cache
def whole(accumulate: int, every: int) -> TrainingResult:
    return train(accumulate, every, None)


# Epochs end after steps 7 and 14, also where a step takes two batches.
@pytest.mark.parametrize("stop", range(1, STEPS))
@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (1, 7), (2, 0), (2, 4)])
def test_it_goes_on_bit_for_bit_from_any_step(
    accumulate: int, every: int, stop: int, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train(accumulate, every, tmp_path, stop)
    resumed, wanted = train(accumulate, every, tmp_path), whole(accumulate, every)
    assert resumed.resumed_at == stop
    assert resumed.losses == wanted.losses
    assert resumed.evaluations == wanted.evaluations
    for name, value in wanted.tensors.items():
        assert torch.equal(value, resumed.tensors[name]), name


def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("stop", [10, 13, 20])
@pytest.mark.parametrize(
    "passes",
    [
        "sparse-train{steps=24,lr=0.01,held_out=0.1",
        "low-rank-split{rank=2,method=svd},heal{method=distil,steps=24,task=1.0",
        "structured-erase{sparsity=0.5},distill{steps=24",
    ],
    ids=["sparse-train", "heal", "distill"],
)
def test_passes_go_on_from_the_end_of_an_epoch(passes: str, stop: int, tmp_path: Path) -> None:
    program, batches = classifier(11)

    def run(folder: str, stop: int = 0) -> tl.Program:
        def say(text: str) -> None:
            if stop and f"step {stop + 1} of" in text:
                raise KeyboardInterrupt

        spec = f"{passes},checkpoint={tmp_path / folder},save_every=1}}"
        return tl.PassManager(spec).run(program, calibration=batches, loss=loss, progress=say)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop)
    resumed, wanted = run("stopped"), run("whole")
    for name, value in wanted.parameters.items():
        assert torch.equal(value, resumed.tensor(name)), name


def weighed(weight: float) -> Any:
    return lambda outputs, batch: weight * F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize(
    "passes",
    [
        "sparse-train{steps=12",
        "structured-erase{sparsity=0.5},heal{method=distil,steps=4,task=1.0",
        "structured-erase{sparsity=0.5},distill{steps=4",
    ],
    ids=["sparse-train", "heal", "distill"],
)
def test_another_loss_and_other_batches_are_another_training(passes: str, tmp_path: Path) -> None:
    program, batches = classifier(11)
    changed = [batches[0], *((x + 1, y) for x, y in batches[1:-1]), batches[-1]]
    given = [(weighed(1.0), batches), (weighed(2.0), batches), (weighed(1.0), changed)]
    spec = f"{passes},checkpoint={tmp_path}}}"

    def run(chosen: Any, data: list[Any]) -> tuple[tl.Program, list[str]]:
        told: list[str] = []
        manager = tl.PassManager(spec)
        return manager.run(program, calibration=data, loss=chosen, progress=told.append), told

    for number, (chosen, data) in enumerate(given, 1):
        first, told = run(chosen, data)
        assert not any("going on" in line for line in told)
        assert len(list(tmp_path.iterdir())) == number
        again, told = run(chosen, data)
        assert any("going on" in line for line in told)
        for name, value in first.parameters.items():
            assert torch.equal(value, again.tensor(name)), name


def test_another_objective_and_other_batches_to_evaluate_on_are_another_training(
    tmp_path: Path,
) -> None:
    program, batches = tied()
    options = TrainingOptions(steps=3, lr=1e-2, checkpoint=str(tmp_path), save_every=1)
    for number in range(1, 4):
        objectives = [objective, lambda forward: 2 * objective(forward), objective]
        validation = None if number < 3 else batches[:1]
        result = Trainer(
            program,
            PassContext(program, "test", batches),
            options,
            objective=objectives[number - 1],
            validation=validation,
        ).run()
        assert result.resumed_at == 0
        assert len(list(tmp_path.iterdir())) == number


def test_batches_are_hashed_once_and_draw_nothing(tmp_path: Path) -> None:
    program, batches = tied()

    class Drawing:
        """Batches that draw when they are read."""

        def __init__(self) -> None:
            self.reads = 0

        def __len__(self) -> int:
            return len(batches)

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            torch.rand(1)
            return batches[index]

    found = []
    for folder in (None, str(tmp_path)):
        data: Any = Drawing()
        options = TrainingOptions(
            steps=7, lr=1e-2, dropout=True, evaluate_every=7, save_every=1, checkpoint=folder
        )
        torch.manual_seed(5)
        ctx = PassContext(program, "test", data)
        result = Trainer(program, ctx, options, objective=objective).run()
        found.append((result.losses, data.reads))
    (plain, few), (saved, more) = found
    assert plain == saved
    assert more == few + len(batches)
