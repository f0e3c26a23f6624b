"""Trainings whose loss becomes infinite or NaN: what is kept, what is told, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchlathe as tl
from tests.passes.sparse_models import classifier
from tests.passes.training_worker import loss as objective
from tests.passes.training_worker import make
from torchlathe.ir import InputError
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.training import Forward, Hook, Trainer, TrainingOptions, TrainingResult

torch.set_num_threads(1)  # everything here is small

NAN = float("nan")


def broken_at(step: int) -> Callable[[Any, Any], torch.Tensor]:
    """A loss that is NaN in one step, counted from 1."""
    seen = 0

    def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal seen
        found = F.cross_entropy(outputs, batch[1])
        if not found.requires_grad:
            return found
        seen += 1
        return found * NAN if seen == step else found

    return loss


def run(passes: str, step: int) -> tl.Program:
    program, batches = classifier(8)
    return tl.PassManager(passes).run(program, calibration=batches, loss=broken_at(step))


SPARSE = "sparse-train{sparsity=0.5,steps=40,lr=0.01,start=0,pruning=12,periods=3"


def test_a_sparse_training_that_diverges_before_it_was_evaluated_is_an_error() -> None:
    with pytest.raises(tl.Error, match="nan at step 16, where training stopped, and no state"):
        run(f"{SPARSE},evaluate_every=20}},structured-erase{{zeros=true}}", 16)


def test_a_sparse_training_that_diverges_later_ends_in_what_it_reports() -> None:
    after = run(f"{SPARSE},evaluate_every=14}},structured-erase{{zeros=true}}", 16)
    trained, erased = after.history
    assert trained.changed
    assert trained.statistics["stopped"] == "diverged"
    assert any("nan at step 16" in told["message"] for told in trained.diagnostics)
    assert trained.statistics["zero_groups"] == erased.statistics["erased_units"] == 8
    assert trained.statistics["loss_after"] == trained.details["training"]["sparse-train"]["best"][
        "loss"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "passes",
    [
        "low-rank-split{rank=2,method=svd},heal{method=distil,steps=12,task=1.0,evaluate_every=2}",
        "structured-erase{sparsity=0.5},distill{steps=12,evaluate_every=2}",
    ],
    ids=["heal", "distill"],
)
def test_others_end_in_the_best_state_and_say_so(passes: str) -> None:
    record = run(passes, 8).history[-1]
    assert record.statistics["stopped"] == "diverged"
    assert record.statistics["steps"] == 7
    assert record.statistics["loss_after"] < record.statistics["loss_before"]
    assert any("nan at step 8" in told["message"] for told in record.diagnostics)


class Forget(Hook):
    """Lets what was seen until a step not count."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step < self.step:
            trainer.forget_best()


def evaluated(held: list[float]) -> TrainingResult:
    """Six steps with these losses on the batch held out, of which the first three do not count."""
    program, batches = make("tied")
    values = iter(held)

    def told(forward: Forward) -> torch.Tensor:
        found = objective(forward)
        return found if forward.training else torch.tensor(next(values))

    options = TrainingOptions(steps=6, lr=1e-2, evaluate_every=2)
    ctx = PassContext(program, "test", batches)
    return Trainer(program, ctx, options, objective=told, hooks=[Forget(3)]).run()


def test_an_evaluation_that_is_not_finite_is_not_the_best() -> None:
    result = evaluated([5.0, 5.0, NAN, 6.0])
    assert result.best == {"step": 6, "loss": 6.0}
    assert result.tensors
    with pytest.raises(InputError, match="no loss on the batches held out was finite"):
        evaluated([5.0, 5.0, NAN, float("inf")])
