"""Who is learnt from: programs and modules, one or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, OptionError, Program
from torchlathe.ir.capturing import eval_mode
from torchlathe.passes.statistics.saving import batch_digest, state_key
from torchlathe.passes.tune.healing.reference import Reference
from torchlathe.passes.tune.training import Forward
from torchlathe.passes.tune.training.hooks import Hook

if TYPE_CHECKING:
    from torchlathe.passes.tune.distilling.learning_teacher import LearningTeacher
    from torchlathe.passes.tune.training.trainer import Trainer

__all__ = ["TeacherMixture", "Teachers", "as_teachers"]


def as_teachers(given: Any) -> tuple[Program | nn.Module, ...]:
    """What an option ``teacher`` may be: nothing, one of them, or a sequence.

    Raises:
        OptionError: Something else.
    """
    if given is None:
        return ()
    found = tuple(given) if isinstance(given, list | tuple) else (given,)
    for one in found:
        if not isinstance(one, Program | nn.Module):
            raise OptionError(
                f"a teacher is a module or a Program, got {type(one).__name__}",
                hint="teacher=model, or teacher=[model, another]",
            )
    return found


class Teachers:
    """Outputs of teachers on the batches of a training, without gradients.

    Args:
        student: The program that learns: it knows how inputs are put together.
        teachers: At least one.
        taps: Nodes of the first teacher, if that is a program, whose values are wanted.
        learning: Stands for the only teacher, and trains along; its outputs have gradients.
    """

    def __init__(
        self,
        student: Program,
        teachers: Sequence[Program | nn.Module],
        taps: Sequence[str] = (),
        learning: LearningTeacher | None = None,
    ) -> None:
        self._student, self._teachers = student, tuple(teachers)
        self.learning = learning
        self._references = [
            Reference(one, taps if index == 0 else ()) if isinstance(one, Program) else None
            for index, one in enumerate(self._teachers)
        ]

    def __call__(self, forward: Forward) -> tuple[list[Sequence[Any]], Mapping[str, torch.Tensor]]:
        """Flat outputs of each teacher, and the taps of the first.

        Raises:
            InputError: A teacher returns another number of outputs than the student.
        """
        outputs: list[Sequence[Any]] = []
        taps: Mapping[str, torch.Tensor] = {}
        for teacher, reference in zip(self._teachers, self._references, strict=True):
            if self.learning is not None:
                found: Sequence[Any] = self.learning(forward)
            elif reference is not None:
                told = reference(forward)
                found = told.outputs
                taps = taps or told.taps
            else:
                assert isinstance(teacher, nn.Module)
                found = self._ask(teacher, forward)
            if len(found) != len(forward.flat_outputs):
                raise InputError(
                    f"a teacher returns {len(found)} values, and the student "
                    f"{len(forward.flat_outputs)}",
                    hint="wrap the teacher in a module that returns what the student does",
                )
            outputs.append(found)
        return outputs, taps

    def _ask(self, teacher: nn.Module, forward: Forward) -> list[Any]:
        args, kwargs = pytree.tree_unflatten(list(forward.flat), self._student.in_spec)
        with torch.no_grad(), eval_mode(teacher):
            return pytree.tree_leaves(teacher(*args, **kwargs))

    def key(self) -> str:
        """What they are, for the name of a checkpoint."""
        return " ".join(
            state_key(one, ())
            if isinstance(one, Program)
            else batch_digest(type(one).__qualname__, dict(one.state_dict()))
            for one in self._teachers
        )


class TeacherMixture(Hook):
    """Mixes the logits of several teachers, with weights that it learns for each sample.

    ``a = softmax(MLP([t_1; ...; t_M]))`` and ``p = sum_m a_m t_m``; the entropy of the weights is
    rewarded, so that no teacher is dropped early.

    Source: HPM-KD's multi-teacher attention. There the network reads the sample as well; reading
    the teachers' logits only (a reconstruction) makes it fit any input.

    Args:
        teachers: How many.
        classes: Of their logits.
        hidden: Units of the network.
        entropy: Weight of the reward, in nats.
        seed: Of the network's first weights.
    """

    def __init__(
        self,
        teachers: int,
        classes: int,
        *,
        hidden: int = 32,
        entropy: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.entropy = entropy
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(teachers * classes, hidden), nn.ReLU(), nn.Linear(hidden, teachers)
            )
            last = self.network[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)  # all alike to begin with
            nn.init.zeros_(last.bias)

    def __call__(self, logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed logits, and the term for the loss.

        Args:
            logits: Of each teacher, (..., classes).

        Returns:
            (..., classes), and a scalar.
        """
        self.network.to(logits[0].device)
        logarithms = F.log_softmax(self.network(torch.cat(list(logits), -1).float()), -1)
        weights = logarithms.exp()
        mixed = (weights[..., None, :] * torch.stack(list(logits), -1)).sum(-1)
        # By logarithms, for the slope of -w log w is infinite where w is too small to be above 0.
        entropy = -(weights * logarithms).sum(-1).mean()
        return mixed, -self.entropy * entropy

    def parameters(self) -> list[nn.Parameter]:
        """What is learnt."""
        return list(self.network.parameters())

    def before_step(self, trainer: Trainer) -> None:
        """Average gradients over processes, for the network is not sharded."""
        trainer.processes.average_unsharded(self.parameters())

    def state(self) -> dict[str, Any]:
        """The weights."""
        return dict(self.network.state_dict())

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take weights back."""
        self.network.load_state_dict(dict(state))
