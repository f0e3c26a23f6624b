"""A teacher that trains along with the student that it teaches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.ir import PreconditionError, Program
from torchlathe.passes.tune.distilling.logits import KnowledgeDistillation
from torchlathe.passes.tune.training import Forward, Hook, Trainer, TrainingModule
from torchlathe.passes.tune.training.module import choose_trainable

__all__ = ["LearningTeacher"]


class LearningTeacher(Hook):
    """A copy of a teacher, which learns the labels and, a little, from its student.

    The teacher minimises ``task + weight T^2 KL(p_student || p_teacher)``: it stays within reach of
    what the student can do. Neither of the two gets gradients through the other.

    Source: the teacher's side of BD-KD (arXiv 2212.12965), whose regulariser is the reverse
    divergence; which temperature it has there is not known (a reconstruction: that of the
    student's loss).

    Args:
        teacher: Stays as it is.
        student: Knows how inputs are put together.
        rate: Highest learning rate of the teacher; it follows the student's schedule.
        weight: Of the divergence.

    Raises:
        PreconditionError: The teacher has no parameter to train.
    """

    def __init__(
        self, teacher: Program | nn.Module, student: Program, *, rate: float, weight: float = 1.0
    ) -> None:
        self.rate, self.weight = rate, weight
        self._student = student
        self._module: nn.Module
        if isinstance(teacher, Program):
            self._module = TrainingModule(teacher, choose_trainable(teacher))
        else:
            self._module = copy.deepcopy(teacher)
        if not self.parameters():
            raise PreconditionError(
                "the teacher is to train along, but has no parameter that requires gradients",
                hint="teacher.requires_grad_()",
            )

    def __call__(self, forward: Forward) -> Sequence[Any]:
        """Flat outputs; with gradients in training."""
        self._module.train(forward.training)
        if isinstance(self._module, TrainingModule):
            outputs: Sequence[Any] = self._module(*forward.flat)[0]
            return outputs
        args, kwargs = pytree.tree_unflatten(list(forward.flat), self._student.in_spec)
        return pytree.tree_leaves(self._module(*args, **kwargs))

    def divergence(
        self, teacher: torch.Tensor, student: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        """What the teacher adds to its task, a scalar, for logits of one shape."""
        matched = KnowledgeDistillation(temperature)
        return self.weight * matched(teacher.float(), student.detach().float())

    def parameters(self) -> list[nn.Parameter]:
        """What is learnt."""
        return [p for p in self._module.parameters() if p.requires_grad]

    def group(self) -> dict[str, Any]:
        """Its parameters, as optimizers take them."""
        return {"params": self.parameters(), "lr": self.rate}

    def before_step(self, trainer: Trainer) -> None:
        """Average gradients over processes, for it is not sharded, and clip them by themselves."""
        trainer.processes.average_unsharded(self.parameters())
        if trainer.options.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), trainer.options.clip)

    @torch.no_grad()
    def after_step(self, trainer: Trainer) -> None:
        """Average running statistics over processes."""
        if trainer.processes.world > 1:
            for statistic in self._statistics():
                trainer.processes.sum(statistic).div_(trainer.processes.world)

    def _statistics(self) -> list[torch.Tensor]:
        module = self._module
        if isinstance(module, TrainingModule):
            found = [module.tensor(name) for name in module.changing()]
            return [tensor for tensor in found if not tensor.requires_grad]
        return [buffer for buffer in module.buffers() if buffer.is_floating_point()]

    def state(self) -> dict[str, Any]:
        """Weights and running statistics."""
        return dict(self._module.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._module.load_state_dict(dict(state))
