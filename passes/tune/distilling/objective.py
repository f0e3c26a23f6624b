"""What distillation minimises, put together from the losses of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

from torchlathe.ir import InputError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.losses import loss_of
from torchlathe.passes.tune.distilling.images import SpectrumMatching, StructuralSimilarity
from torchlathe.passes.tune.distilling.logits import BalancedDistillation, KnowledgeDistillation
from torchlathe.passes.tune.distilling.regularising import condition_gap
from torchlathe.passes.tune.distilling.teachers import TeacherMixture, Teachers
from torchlathe.passes.tune.distilling.temperatures import Temperature
from torchlathe.passes.tune.distilling.values import ValueMatching, relative_error
from torchlathe.passes.tune.healing.reference import fidelity, floating
from torchlathe.passes.tune.training import Forward, Hook

__all__ = ["DistillingObjective", "LogitLoss", "ValueLoss"]

LogitLoss = Literal["kd", "balanced"]
ValueLoss = Literal["values", "spectrum", "ms-ssim"]


@dataclass
class DistillingObjective:
    """``(1 - alpha) task + alpha distillation + ...``.

    Attributes:
        program: The student.
        ctx: Has the user's loss.
        teachers: Who is learnt from.
        logits: Which outputs are logits.
        alpha: Share of the distillation; 1 where there is no loss.
        temperature: Of logits.
        logit_loss: Plain or balanced.
        delta: Of the balanced one.
        value_loss: For outputs that are no logits.
        hidden: Weight of hidden states.
        pairs: Names of nodes here and in the first teacher whose values are to agree.
        mixture: Learns whom to listen to; None for the mean of all.
        condition: Weight of the condition number of weights.
        weights: Gives these, by name.
        heads: How many of the last outputs are auxiliary heads.
        head_weight: Weight of all of them together.
    """

    program: Program
    ctx: PassContext
    teachers: Teachers
    logits: Sequence[bool]
    alpha: float
    temperature: Temperature
    logit_loss: LogitLoss = "kd"
    delta: float = 2.0
    value_loss: ValueLoss = "values"
    hidden: float = 0.0
    pairs: Sequence[tuple[str, str]] = ()
    mixture: TeacherMixture | None = None
    condition: float = 0.0
    weights: Callable[[], Mapping[str, torch.Tensor]] = dict
    heads: int = 0
    head_weight: float = 0.0
    _last: tuple[Forward, list[Sequence[Any]], Mapping[str, torch.Tensor]] | None = field(
        default=None, repr=False
    )

    @property
    def hooks(self) -> list[Hook]:
        """What has a state of its own."""
        return [self.temperature, *([] if self.mixture is None else [self.mixture])]

    def _told(self, forward: Forward) -> tuple[list[Sequence[Any]], Mapping[str, torch.Tensor]]:
        if self._last is None or self._last[0] is not forward:
            self._last = forward, *self.teachers(self._own(forward))
        return self._last[1], self._last[2]

    def _own(self, forward: Forward) -> Forward:
        """The forward without auxiliary heads."""
        if not self.heads:
            return forward
        outputs, _ = forward.outputs
        flat = forward.flat_outputs[: -self.heads]
        given = forward
        return Forward(
            given.batch, given.flat, outputs, flat, given.taps, given.step, given.training
        )

    def __call__(self, forward: Forward) -> torch.Tensor:
        """The loss of one batch."""
        own = self._own(forward)
        told, taps = self._told(forward)
        # Evaluations are comparable only at one temperature.
        degree = self.temperature.at(forward.step) if forward.training else self.temperature.most
        loss = self._distilled(own, told, degree)
        if self.alpha < 1:
            loss = self.alpha * loss + (1 - self.alpha) * loss_of_either(self.ctx, own)
        for mine, theirs in self.pairs:
            found = relative_error(own.taps[mine].float(), taps[theirs].float())
            loss = loss + self.hidden / len(self.pairs) * found
        if self.condition and forward.training:
            gaps = [condition_gap(w.float()) for w in self.weights().values()]
            loss = loss + self.condition * torch.stack(gaps).mean()
        if self.heads and forward.training:
            loss = loss + self.head_weight * self._headed(forward, degree)
        if forward.training:
            self.temperature.tell(float(loss.detach()))
        return loss

    def _distilled(
        self, own: Forward, told: Sequence[Sequence[Any]], degree: float
    ) -> torch.Tensor:
        places = floating(own.flat_outputs, told[0])
        if not places:
            raise InputError(
                "no output of the student has the shape of the teacher's",
                hint="wrap the teacher in a module that returns what the student does",
            )
        total: torch.Tensor | None = None
        for place in places:
            mine = own.flat_outputs[place].float()
            theirs = [outputs[place].float() for outputs in told]
            found = self._matched(mine, theirs, self.logits[place], degree, own.training)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _matched(
        self,
        mine: torch.Tensor,
        theirs: Sequence[torch.Tensor],
        logits: bool,
        degree: float,
        training: bool,
    ) -> torch.Tensor:
        extra = mine.new_zeros(())
        mean = torch.stack(list(theirs)).mean(0)
        if not logits:
            return self._value_loss()(mine, mean)
        if self.mixture is not None and training:
            mean, extra = self.mixture(theirs)
            # Whom to listen to is learnt from the student's loss, so gradients go through.
            return self._logit_loss(degree, mine, mean) + extra
        return self._logit_loss(degree, mine, mean)

    def _logit_loss(self, degree: float, mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if self.logit_loss == "balanced":
            return BalancedDistillation(degree, self.delta)(mine, theirs)
        if not theirs.requires_grad:
            return KnowledgeDistillation(degree)(mine, theirs)
        p, q = (F.log_softmax(z / degree, -1) for z in (theirs, mine))
        return degree**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()

    def _value_loss(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if self.value_loss == "spectrum":
            return SpectrumMatching()
        return StructuralSimilarity() if self.value_loss == "ms-ssim" else ValueMatching()

    def _headed(self, forward: Forward, degree: float) -> torch.Tensor:
        """Each head learns from the classifier of the model itself, which is the deepest."""
        own = self._own(forward)
        deepest = own.flat_outputs[list(self.logits).index(True)].detach()
        heads = forward.flat_outputs[-self.heads :]
        matched = KnowledgeDistillation(degree)
        found = torch.stack([matched(head.float(), deepest.float()) for head in heads]).mean()
        if self.ctx.loss is None:
            return found
        shaped = [_replaced(self.program, own, self.logits, head) for head in heads]
        losses = [loss_of_either(self.ctx, one) for one in shaped]
        return found + torch.stack(losses).mean()

    def metrics(self, forward: Forward) -> Mapping[str, float]:
        """Fidelity to the first teacher, and the user's loss if there is one."""
        told, _ = self._told(forward)
        own = self._own(forward)
        found = fidelity(own.flat_outputs, told[0], self.logits)
        if self.ctx.loss is not None:
            found["task"] = float(loss_of_either(self.ctx, own))
        return found


def loss_of_either(ctx: PassContext, forward: Forward) -> torch.Tensor:
    """The user's loss, also where no gradient is wanted."""
    if forward.training:
        return loss_of(ctx, forward.outputs, forward.batch)
    assert ctx.loss is not None
    return ctx.loss(forward.outputs, forward.batch).reshape(())


def _replaced(
    program: Program, own: Forward, logits: Sequence[bool], head: torch.Tensor
) -> Forward:
    """The outputs of the model with a head's logits in the place of its own."""
    flat = list(own.flat_outputs)
    flat[list(logits).index(True)] = head
    outputs = program.unflatten_outputs(flat)
    return Forward(own.batch, own.flat, outputs, flat, own.taps, own.step, own.training)
