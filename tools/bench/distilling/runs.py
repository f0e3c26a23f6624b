"""One training of a small student, by each of the ways to learn from larger networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.passes import Distill, PassManager
from torchlathe.tools.bench.distilling.data import TASKS, Split, Task, size, split, width_for
from torchlathe.tools.compat import define_torchvision_ops

__all__ = ["ABLATIONS", "METHODS", "RATIO", "Method", "one_run", "teacher_run"]

# How many times fewer parameters a student has.
RATIO: Final = 12
BATCH: Final = 32
ALPHA: Final = 0.7


@dataclass(frozen=True)
class Method:
    """How a student learns.

    Attributes:
        options: Of `Distill`.
        teachers: How many there are.
        chain: Students in between, each the next one's only teacher.
        along: The teacher begins untrained, and trains along.
    """

    options: dict[str, Any] = field(default_factory=dict)
    teachers: int = 1
    chain: int = 0
    along: bool = False


_HPM: Final = {"temperature_schedule": "cosine", "attention": True}

METHODS: Final[dict[str, Method]] = {
    "alone": Method({"alpha": 0.0}),
    "KD": Method(),
    "BD-KD": Method({"loss": "balanced"}),
    "LSSKD": Method({"alpha": 0.0, "heads": 2, "rotations": True}),
    "HPM-KD": Method(_HPM, teachers=3, chain=1),
}

# By title: the task, and what differs. What a method is already was measured as that.
ABLATIONS: Final[dict[str, tuple[str, dict[str, Method]]]] = {
    "temperature of KD": (
        "digits, features",
        {
            f"T = {t:g}": METHODS["KD"] if t == 4 else Method({"temperature": t})
            for t in (1.0, 2.0, 4.0, 8.0)
        },
    ),
    "balance of BD-KD": (
        "digits, features",
        {
            f"delta = {d:g}": METHODS["BD-KD"]
            if d == 2
            else Method({"loss": "balanced", "delta": d})
            for d in (1.0, 2.0, 4.0)
        }
        | {"delta = 2, the teacher trains along": Method({"loss": "balanced"}, along=True)},
    ),
    "parts of HPM-KD": (
        "digits, features",
        {
            "one teacher, no chain": Method({"temperature_schedule": "cosine"}),
            "three teachers, their mean": Method({"temperature_schedule": "cosine"}, teachers=3),
            "three teachers, attention": Method(_HPM, teachers=3),
            "and a chain of 1": METHODS["HPM-KD"],
            "and a chain of 2": Method(_HPM, teachers=3, chain=2),
            "and a chain of 3": Method(_HPM, teachers=3, chain=3),
        },
    ),
    "heads of LSSKD": (
        "digits, CNN",
        {
            "no heads": METHODS["alone"],
            "2 heads": Method({"alpha": 0.0, "heads": 2}),
            "2 heads and the deepest, rotations": METHODS["LSSKD"],
            "2 heads and KD": Method({"heads": 2}),
        },
    ),
}


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


@cache
def _teacher(task: str, seed: int, number: int) -> nn.Module:
    """A large net, trained on labels alone."""
    chosen = TASKS[task]
    data = split(chosen, seed)
    model = _untrained(chosen, seed, number)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, chosen.rate, total_steps=chosen.steps)
    for _ in range(chosen.steps):
        rows = torch.randint(len(data.train[1]), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[0][rows]), data.train[1][rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _untrained(task: Task, seed: int, number: int = 0) -> nn.Module:
    torch.manual_seed(100 * seed + number)
    return task.net(task.width)


def teacher_run(task: str, seed: int) -> dict[str, float]:
    """What the first teacher comes to."""
    model = _teacher(task, seed, 0)
    with torch.no_grad():
        return _measured(model(split(TASKS[task], seed).test[0]), task, seed, size(model))


def one_run(task: str, method: Method, seed: int) -> dict[str, float]:
    """Train a student, and measure it on the test samples."""
    chosen = TASKS[task]
    data = split(chosen, seed)
    teachers: list[Any] = [_teacher(task, seed, number) for number in range(method.teachers)]
    whole = size(chosen.net(chosen.width))
    options = dict(method.options)
    if method.along:
        teachers = [_untrained(chosen, seed)]
        options["teacher_lr"] = chosen.rate
    for stage in range(1, method.chain + 1):
        wanted = whole * RATIO ** (-stage / (method.chain + 1))
        between = _student(chosen, data, width_for(chosen, wanted), seed, teachers, options)
        teachers = [between]
        options.pop("attention", None)
    width = width_for(chosen, whole / RATIO)
    student = _student(chosen, data, width, seed, teachers, options)
    parameters = sum(p.numel() for p in student.parameters.values())
    return _measured(student.run(data.test[0]).detach(), task, seed, parameters)


def _student(
    task: Task, data: Split, width: int, seed: int, teachers: list[Any], options: dict[str, Any]
) -> tl.Program:
    torch.manual_seed(seed)
    if not task.images:
        options = {**options, "rotations": False}
    inputs, labels = data.train
    order = torch.randperm(len(labels))
    batches = [(inputs[rows], labels[rows]) for rows in order.split(BATCH) if len(rows) > 1]
    program = tl.capture(task.net(width).eval(), (inputs[:2],), dynamic_shapes="auto")
    distill = Distill(
        **{
            "teacher": teachers,
            "steps": task.steps,
            "lr": task.rate,
            "alpha": ALPHA,
            "optimizer_options": {"weight_decay": 0.01},
            **options,
        }
    )
    return PassManager([distill], verify="off").run(
        program, calibration=batches, loss=_loss, seed=seed
    )


def _measured(logits: Tensor, task: str, seed: int, parameters: int) -> dict[str, float]:
    """Accuracy and expected calibration error (15 bins) in %, and the log loss in nats."""
    define_torchvision_ops()
    from torchmetrics.functional.classification import multiclass_calibration_error

    data = split(TASKS[task], seed)
    labels = data.test[1]
    error = multiclass_calibration_error(
        logits.softmax(-1), labels, num_classes=data.classes, n_bins=15
    )
    return {
        "accuracy": 100 * float((logits.argmax(-1) == labels).double().mean()),
        "ece": 100 * float(error),
        "log_loss": float(F.cross_entropy(logits, labels).detach()),
        "parameters": parameters,
    }
