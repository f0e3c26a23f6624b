"""What distillation minimises, put together from the losses of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from torchlathe.ir import InputError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.losses import loss_of
from torchlathe.passes.statistics.running import first_extent
from torchlathe.passes.tune.distilling.attending import AttentionSite
from torchlathe.passes.tune.distilling.images import SpectrumMatching, StructuralSimilarity
from torchlathe.passes.tune.distilling.layered import ROTATIONS, JointLabels
from torchlathe.passes.tune.distilling.learning_teacher import LearningTeacher
from torchlathe.passes.tune.distilling.logits import BalancedDistillation, KnowledgeDistillation
from torchlathe.passes.tune.distilling.regularising import BiasLoss, condition_gap
from torchlathe.passes.tune.distilling.teachers import TeacherMixture, Teachers
from torchlathe.passes.tune.distilling.temperatures import Temperature
from torchlathe.passes.tune.distilling.values import (
    Anchors,
    AttentionMatching,
    ValueMatching,
    relative_error,
)
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
        similarity: That of images, where it is the loss.
        hidden: Weight of hidden states.
        pairs: Names of nodes here and in the first teacher whose values are to agree.
        mixture: Learns whom to listen to; None for the mean of all.
        condition: Weight of the condition number of weights.
        weights: Gives these, by name.
        heads: How many of the last outputs are auxiliary heads.
        head_weight: Weight of all of them together.
        rotations: In training, the module is given each image in four rotations, and heads tell
            pairs of class and rotation; the deepest is last.
        maps: Attentions here and in the first teacher whose maps are to agree.
        map_weight: Weight of them.
        anchors: Centres of the teacher's embeddings; None for no such term.
        anchor_weight: Weight of that term.
        features: Node whose variance weighs samples; None for samples that count alike.
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
    similarity: StructuralSimilarity = field(default_factory=StructuralSimilarity)
    hidden: float = 0.0
    pairs: Sequence[tuple[str, str]] = ()
    mixture: TeacherMixture | None = None
    condition: float = 0.0
    weights: Callable[[], Mapping[str, torch.Tensor]] = dict
    heads: int = 0
    head_weight: float = 0.0
    rotations: bool = False
    maps: Sequence[tuple[AttentionSite, AttentionSite]] = ()
    map_weight: float = 0.0
    anchors: Anchors | None = None
    anchor_weight: float = 1.0
    features: str | None = None
    bias: BiasLoss = field(default_factory=BiasLoss)
    _last: tuple[Forward, list[Sequence[Any]], Mapping[str, torch.Tensor]] | None = field(
        default=None, repr=False
    )

    @property
    def hooks(self) -> list[Hook]:
        """What has a state of its own."""
        bias = self.bias if self.features is not None else None
        others: list[Hook | None] = [self.mixture, self.teachers.learning, bias]
        return [self.temperature, *(hook for hook in others if hook is not None)]

    def _told(self, forward: Forward) -> tuple[list[Sequence[Any]], Mapping[str, torch.Tensor]]:
        if self._last is None or self._last[0] is not forward:
            self._last = forward, *self.teachers(self._own(forward))
        return self._last[1], self._last[2]

    def _own(self, forward: Forward) -> Forward:
        """The forward without auxiliary heads, and without images that are turned."""
        if not self.heads:
            return forward
        outputs, _ = forward.outputs
        flat, taps = forward.flat_outputs[: -self.heads], forward.taps
        if self.rotations and forward.training:
            count = next(len(x) for x in forward.flat if isinstance(x, torch.Tensor) and x.dim())
            flat = [_unturned(x, count) for x in flat]
            taps = {name: _unturned(value, count) for name, value in taps.items()}
            outputs = self.program.unflatten_outputs(flat)
        given = forward
        return Forward(given.batch, given.flat, outputs, flat, taps, given.step, given.training)

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
        for ours, others in self.maps:
            matched = AttentionMatching(divergence=True)
            found = matched(ours.probabilities(own.taps), others.probabilities(taps))
            loss = loss + self.map_weight / len(self.maps) * found
        if self.condition and forward.training:
            gaps = [condition_gap(w.float()) for w in self.weights().values()]
            loss = loss + self.condition * torch.stack(gaps).mean()
        if self.heads and forward.training:
            loss = loss + self.head_weight * self._headed(forward, degree)
        if forward.training:
            self.temperature.hear(loss, first_extent(own.flat))
            if self.teachers.learning is not None:
                loss = loss + self._teacher_loss(self.teachers.learning, own, told[0], degree)
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
            theirs = [outputs[place].detach().float() for outputs in told]
            found = self._matched(mine, theirs, self.logits[place], degree, own)
            total = found if total is None else total + found
        assert total is not None
        return total

    def _matched(
        self,
        mine: torch.Tensor,
        theirs: Sequence[torch.Tensor],
        logits: bool,
        degree: float,
        own: Forward,
    ) -> torch.Tensor:
        mean = torch.stack(list(theirs)).mean(0)
        if not logits:
            loss = self._value_loss()(mine, mean)
            if self.anchors is not None and mine.dim() == 2:
                loss = loss + self.anchor_weight * self.anchors(mine, mean)
            return loss
        extra = mine.new_zeros(())
        if self.mixture is not None and own.training:
            # Whom to listen to is learnt from the student's loss, so gradients go through.
            mean, extra = self.mixture(theirs)
        rows = self._logit_loss(degree).rows(mine, mean)
        if self.features is not None and own.training:
            weights = self.bias.weights(own.taps[self.features])
            rows = rows * (weights / weights.mean()).reshape(-1, *[1] * (rows.dim() - 1))
        return rows.mean() + extra

    def _teacher_loss(
        self, teacher: LearningTeacher, own: Forward, told: Sequence[Any], degree: float
    ) -> torch.Tensor:
        """Of a teacher that trains along."""
        loss = loss_of_either(self.ctx, _with_outputs(self.program, own, told))
        for place in floating(own.flat_outputs, told):
            if self.logits[place]:
                loss = loss + teacher.divergence(told[place], own.flat_outputs[place], degree)
        return loss

    def _logit_loss(self, degree: float) -> BalancedDistillation | KnowledgeDistillation:
        if self.logit_loss == "balanced":
            return BalancedDistillation(degree, self.delta)
        return KnowledgeDistillation(degree)

    def _value_loss(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        if self.value_loss == "spectrum":
            return SpectrumMatching()
        return self.similarity if self.value_loss == "ms-ssim" else ValueMatching()

    def _headed(self, forward: Forward, degree: float) -> torch.Tensor:
        """Each head learns labels, and from the deepest: the model's own, or of pairs the last."""
        own = self._own(forward)
        heads = forward.flat_outputs[-self.heads :]
        matched = KnowledgeDistillation(degree)
        if self.rotations:
            task = None if self.ctx.loss is None else self._task_of(own)
            return JointLabels(task, matched)(heads)
        deepest = own.flat_outputs[list(self.logits).index(True)].detach()
        found = torch.stack([matched(head.float(), deepest.float()) for head in heads]).mean()
        if self.ctx.loss is None:
            return found
        task = self._task_of(own)
        return found + torch.stack([task(head) for head in heads]).mean()

    def _task_of(self, own: Forward) -> Callable[[torch.Tensor], torch.Tensor]:
        """The user's loss of other logits in the place of the model's own."""
        return lambda logits: loss_of_either(
            self.ctx, _replaced(self.program, own, self.logits, logits)
        )

    def metrics(self, forward: Forward) -> Mapping[str, float]:
        """Fidelity to the first teacher, and the user's loss if there is one."""
        told, _ = self._told(forward)
        own = self._own(forward)
        found = fidelity(own.flat_outputs, told[0], self.logits)
        if self.ctx.loss is not None:
            found["task"] = float(loss_of_either(self.ctx, own))
        if self.teachers.learning is not None:
            theirs = _with_outputs(self.program, own, told[0])
            found["teacher_task"] = float(loss_of_either(self.ctx, theirs))
        return found


def _unturned(value: Any, count: int) -> Any:
    """The rows of the images as they came, of a value that has rows of all rotations."""
    rows = isinstance(value, torch.Tensor) and value.dim() and len(value) == ROTATIONS * count
    return value[:count] if rows else value


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
    return _with_outputs(program, own, flat)


def _with_outputs(program: Program, own: Forward, flat: Sequence[Any]) -> Forward:
    """The same batch, with other outputs."""
    return replace(own, outputs=program.unflatten_outputs(flat), flat_outputs=flat)
