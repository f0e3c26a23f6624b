"""Distillation as a pass: teachers, schedules, chains, heads."""

from __future__ import annotations

import functools
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import torchlathe as tl
from tests.passes.test_training import worker
from tests.passes.training_worker import distil
from torchlathe.ir import InputError, OptionError, PreconditionError
from torchlathe.passes import Distill, PassManager
from torchlathe.passes.base import PassContext
from torchlathe.passes.tune.distilling.heads import ends_of_blocks, with_heads
from torchlathe.passes.tune.distilling.teachers import TeacherMixture
from torchlathe.passes.tune.distilling.temperatures import Temperature


class Net(nn.Module):
    """Residual blocks with batch norm between a stem and a classifier."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def loss(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


@functools.cache
def task() -> tuple[nn.Module, list[Any]]:
    """A teacher that has learnt a little, and its data."""
    torch.set_num_threads(1)  # everything here is small
    torch.manual_seed(0)
    patterns = torch.randn(5, 1, 8, 8)
    batches = []
    for _ in range(12):
        labels = torch.randint(5, (16,))
        batches.append((patterns[labels] + 0.7 * torch.randn(16, 1, 8, 8), labels))
    teacher = Net(12)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for x, y in batches * 3:
        optimizer.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        optimizer.step()
    return teacher.eval(), batches


@functools.cache
def student() -> tl.Program:
    torch.manual_seed(1)
    return tl.capture(Net(6).eval(), (task()[1][0][0],), dynamic_shapes="auto")


@functools.cache
def taught() -> tl.Program:
    return tl.capture(task()[0], (task()[1][0][0],), dynamic_shapes="auto")


def distilled(**options: Any) -> tuple[tl.Program, Any, tl.Program]:
    teacher, batches = task()
    program = student()
    chosen = {"steps": 20, "lr": 8e-3, "teacher": teacher, **options}
    after = PassManager([Distill(**chosen)]).run(program, calibration=batches, loss=loss)
    return after, after.history[0], program


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "balanced"},
        {"temperature_schedule": "cosine"},
        {"temperature_schedule": "loss"},
        {"heads": 2},
        {"condition": 0.01},
        {"alpha": 0.0},
    ],
    ids=["kd", "balanced", "cosine", "by-loss", "heads", "condition", "task-only"],
)
def test_a_student_learns(options: dict[str, Any]) -> None:
    after, record, before = distilled(**options)
    found = record.statistics
    assert found["top1_after"] > found["top1_before"]
    assert found["task_after"] < found["task_before"]
    # Heads and other helpers leave nothing behind.
    assert [n.name for n in after.nodes] == [n.name for n in before.nodes]
    assert after.parameters.keys() == before.parameters.keys()
    assert after.out_spec == before.out_spec


def test_only_the_teacher_is_asked_where_there_is_no_loss() -> None:
    teacher, batches = deepcopy(task())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    after = PassManager([Distill(teacher=teacher, steps=20, lr=5e-3)]).run(
        student(), calibration=[x for x, _ in batches]
    )
    found = after.history[0].statistics
    assert "task_after" not in found
    assert found["loss_after"] < 0.8 * found["loss_before"]
    assert teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_original_teaches_in_a_pipeline() -> None:
    _, batches = task()
    program = taught()
    passes = "structured-erase{sparsity=0.5},distill{steps=30,lr=0.005,hidden=0.1}"
    after = PassManager(passes).run(program, calibration=batches, loss=loss)
    found = after.history[1].statistics
    assert found["loss_after"] < 0.7 * found["loss_before"]
    record = PassManager("distill").run(program, calibration=batches).history[0]
    assert not record.changed
    assert "its own teacher" in record.diagnostics[0]["message"]


def test_several_teachers_and_whom_to_listen_to() -> None:
    teacher, batches = task()
    torch.manual_seed(3)
    stranger = Net(4).eval()  # has learnt nothing
    for attention in (False, True):
        pass_ = Distill(teacher=[teacher, stranger], attention=attention, steps=20, lr=5e-3)
        after = PassManager([pass_]).run(student(), calibration=batches, loss=loss)
        found = after.history[0].statistics
        assert found["task_after"] < found["task_before"]


def test_the_mixture_is_a_mean_to_begin_with_and_learns() -> None:
    mixture = TeacherMixture(3, 5, entropy=1.0)
    logits = [torch.randn(7, 5) for _ in range(3)]
    mixed, term = mixture(logits)
    assert torch.allclose(mixed, torch.stack(logits).mean(0), atol=1e-6)
    assert float(term.detach()) == pytest.approx(-torch.tensor(3.0).log().item(), abs=1e-6)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        (mixture(logits)[0] - logits[1]).square().mean().backward()
        optimizer.step()
    final = mixture(logits)[0]
    assert (final - logits[1]).square().mean() < 0.1 * (mixed - logits[1]).square().mean()
    other = TeacherMixture(3, 5)
    other.load_state(mixture.state())
    assert torch.equal(other(logits)[0], final)


def test_the_mixture_survives_being_certain() -> None:
    mixture = TeacherMixture(2, 3, entropy=1.0)
    last = mixture.network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([200.0, 0.0]))  # the second weight is 0 in float32
    mixed, term = mixture([torch.randn(4, 3) for _ in range(2)])
    (mixed.square().mean() + term).backward()
    for parameter in mixture.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_divergence_is_told() -> None:
    teacher, batches = task()

    def broken(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs * float("inf")).sum()

    after = PassManager([Distill(teacher=teacher, steps=3)]).run(
        student(), calibration=batches, loss=broken
    )
    record = after.history[0]
    assert record.statistics["stopped"] == "diverged"
    assert any("where training stopped" in told["message"] for told in record.diagnostics)


def test_a_chain_of_students() -> None:
    _, batches = task()
    program = taught()
    chain = ("structured-erase{sparsity=0.3}",)
    passes: list[Any] = [
        "structured-erase{sparsity=0.6}",
        Distill(chain=chain, steps=15, lr=5e-3),
    ]
    after = PassManager(passes).run(program, calibration=batches, loss=loss)
    record = after.history[1]
    assert list(record.details["training"]) == ["student 1", "student"]
    assert record.statistics["chain"] == 1
    assert record.statistics["task_after"] < record.statistics["task_before"]


def test_heads_go_after_blocks_and_leave_the_outputs_as_they_are() -> None:
    program = student()
    assert len(ends_of_blocks(program, 9)) == 2  # the last block has the classifier after it
    headed = with_heads(program, 5, 9)
    assert headed.heads == 2
    x = task()[1][0][0]
    own, heads = headed.program.run(x)
    assert torch.equal(own, program.run(x))
    assert [tuple(head.shape) for head in heads] == [(16, 5), (16, 5)]
    assert headed.names == {"auxiliary_head_0.weight", "auxiliary_head_1.weight"}
    assert not headed.names & set(program.entries)
    flat = tl.capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    with pytest.raises(InputError, match="no blocks"):
        with_heads(flat, 2, 1)


def test_temperatures() -> None:
    cosine = Temperature(8.0, 2.0, "cosine", 11)
    found = [cosine.at(step) for step in range(11)]
    assert found[0] == 8.0
    assert found[5] == pytest.approx(5.0)
    assert found[10] == pytest.approx(2.0)
    assert found == sorted(found, reverse=True)
    by_loss = Temperature(8.0, 2.0, "loss")
    assert by_loss.at(0) == 8.0
    for value in (4.0, 1.0, 2.5):
        by_loss.tell(value)
    assert by_loss.at(3) == pytest.approx(5.0)
    again = Temperature(8.0, 2.0, "loss")
    again.load_state(by_loss.state())
    assert again.at(3) == by_loss.at(3)


def test_a_temperature_follows_the_mean_loss_of_all_processes() -> None:
    def trainer(other: list[float]) -> Any:
        """One of two processes; the other one has this sum of losses over so many samples."""
        found = SimpleNamespace(sum=lambda value: value + torch.tensor(other, dtype=value.dtype))
        return SimpleNamespace(processes=found)

    first, second = (Temperature(8.0, 2.0, "loss") for _ in range(2))
    for losses in ((4.0, 2.0), (1.0, 2.0), (2.5, 1.0)):
        for mine, own, others in ((first, 0, 1), (second, 1, 0)):
            # Three samples here, and two there; each in two batches of a step.
            counts = (3, 2)
            for _ in range(2):
                mine.hear(torch.tensor(losses[own], requires_grad=True), counts[own])
            mine.before_step(trainer([2 * losses[others] * counts[others], 2 * counts[others]]))
    assert first.state() == second.state()
    assert first.range == pytest.approx((1.4, 3.2))
    assert first.last == pytest.approx(1.9)


@pytest.mark.slow
def test_two_processes_distil_as_one_does(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = worker("distil", str(out), processes=2)
    assert done.returncode == 0, done.stderr
    found, alone = load_file(out), distil()
    assert alone.history[-1].details["training"]["student"]["best"]["step"] > 0
    assert found.keys() == alone.parameters.keys()
    for name, tensor in alone.parameters.items():
        # Sums over samples are taken in another order, and Adam divides by small ones.
        assert torch.allclose(found[name], tensor, atol=1e-4), name


def test_it_is_resumed_with_what_hooks_know(tmp_path: Path) -> None:
    teacher, batches = task()
    options: dict[str, Any] = {
        "teacher": [teacher, Net(4).eval()],
        "attention": True,
        "temperature_schedule": "loss",
        "steps": 8,
        "save_every": 4,
        "checkpoint": str(tmp_path),
    }

    def run(stop: bool) -> tl.Program:
        def say(text: str) -> None:
            if stop and text.startswith("step 6 "):
                raise KeyboardInterrupt

        torch.manual_seed(2)
        given = {**options, "teacher": [teacher, stranger]}
        return PassManager([Distill(**given)]).run(
            student(), calibration=batches, loss=loss, progress=say
        )

    torch.manual_seed(9)
    stranger = Net(4).eval()
    with pytest.raises(KeyboardInterrupt):
        run(True)
    resumed = run(False)
    for file in tmp_path.iterdir():
        file.unlink()
    whole = run(False)
    for name, value in whole.parameters.items():
        assert torch.equal(value, resumed.tensor(name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"delta": 0.5}, "delta is 0.5"),
        ({"heads": -1}, "heads is -1"),
        ({"temperature": 0.0}, "temperatures must be positive"),
        ({"temperature_schedule": "cosine", "temperature_least": 9.0}, "above the largest"),
        ({"teacher": 3}, "a teacher is a module or a Program, got int"),
        ({"attention": True}, "attention is between teachers"),
        ({"chain": ("no-such-pass",)}, "there is no pass no-such-pass"),
    ],
    ids=["alpha", "delta", "heads", "temperature", "schedule", "teacher", "attention", "chain"],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tl.Error, match=message):
        Distill(**options)


def test_teachers_that_do_not_fit() -> None:
    teacher, batches = task()
    program = student()
    with pytest.raises(PreconditionError, match="needs calibration"):
        PassManager([Distill(teacher=teacher)]).run(program)
    with pytest.raises(PreconditionError, match="needs a teacher"):
        Distill().run(program, PassContext(program, "distill", batches))

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = x.mean((1, 2, 3), keepdim=True)[:, :, 0, 0]
            return y, y

    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    for wrong, message in ((Two(), "returns 2 values"), (Wide(), "shape of the teacher's")):
        with pytest.raises(tl.Error, match=message):
            PassManager([Distill(teacher=wrong, steps=1)]).run(program, calibration=batches)
    with pytest.raises(OptionError):
        Distill(teacher=["model"])
