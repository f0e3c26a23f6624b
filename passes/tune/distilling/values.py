"""Losses between values that are no logits: embeddings, hidden states, attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchlathe.ir import OptionError

__all__ = ["Anchors", "AttentionMatching", "ValueMatching", "relative_error"]

_TINY = 1e-12


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean over samples (the first axis) of ``|s - t|^2 / |t|^2``; a scalar.

    Values of one axis count as one sample, for each by itself may be nearly zero.
    """
    teacher = teacher.detach()
    wrong, scale = (student - teacher).square(), teacher.square()
    if teacher.dim() < 2:
        return wrong.sum() / scale.sum().clamp_min(_TINY)
    found: torch.Tensor = wrong.flatten(1).sum(1) / scale.flatten(1).sum(1).clamp_min(_TINY)
    return found.mean()


@dataclass(frozen=True)
class ValueMatching:
    """Relative squared error, and one minus the cosine of each row of the last axis.

    Of the hidden states of two networks it is what TinyBERT (arXiv 1909.10351, eq. 8) and others
    match, made relative so that layers of any scale count alike (own).

    Attributes:
        direction: Weight of the cosine.
    """

    direction: float = 1.0

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: (..., features).
            teacher: In the same shape.

        Returns:
            A scalar.
        """
        loss = relative_error(student, teacher)
        if not self.direction:
            return loss
        rows = F.cosine_similarity(student, teacher.detach(), dim=-1)
        return loss + self.direction * (1 - rows).mean()


@dataclass(frozen=True)
class AttentionMatching:
    """Squared differences of attention between queries and keys, or their divergence.

    Heads are averaged where the two networks have other numbers of them.

    Source: TinyBERT (arXiv 1909.10351, eq. 7) for squares of scores, MobileBERT (arXiv 2004.02984,
    eq. 3) for divergences of probabilities.

    Attributes:
        divergence: Take ``KL(teacher || student)`` of rows, which have to be probabilities.
    """

    divergence: bool = False

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: (batch, heads, queries, keys).
            teacher: The same, with any number of heads.

        Returns:
            A scalar.
        """
        teacher = teacher.detach()
        if student.shape[1] != teacher.shape[1]:
            student, teacher = student.mean(1), teacher.mean(1)
        if not self.divergence:
            return F.mse_loss(student, teacher)
        ratio = (teacher + _TINY).log() - (student + _TINY).log()
        return (teacher * ratio).sum(-1).mean()


class Anchors:
    """What a few fixed points say about embeddings: which of them each embedding is near.

    With ``s_k = cos(student, a_k)`` and likewise t of the teacher, the loss is
    ``KL(softmax(t / tau) || softmax(s / tau))``, and ``relations`` times the mean square of the
    differences of the two matrices of cosines between the embeddings of a batch.

    Source: own regulariser in the spirit of ECR (embedding-consistent reconstruction), whose text
    was not to be had; anchors are the centres of k-means of the teacher's embeddings.

    Args:
        anchors: (anchors, features).
        temperature: tau, of cosines.
        relations: Weight of the second term.

    Raises:
        OptionError: A temperature that is not positive.
    """

    def __init__(
        self, anchors: torch.Tensor, *, temperature: float = 0.1, relations: float = 1.0
    ) -> None:
        if not temperature > 0:
            raise OptionError(f"temperature is {temperature}, but must be positive")
        self.anchors = F.normalize(anchors.detach(), dim=-1)
        self.temperature, self.relations = temperature, relations

    @classmethod
    def of(
        cls, embeddings: torch.Tensor, count: int, *, seed: int = 0, rounds: int = 20
    ) -> torch.Tensor:
        """Centres of embeddings on the sphere, by k-means.

        Args:
            embeddings: (samples, features).
            count: How many centres.
            seed: Of those that it begins with.
            rounds: At most so many.

        Raises:
            OptionError: More centres than samples, or none.
        """
        if not 1 <= count <= len(embeddings):
            raise OptionError(f"count is {count}, but must be from 1 to {len(embeddings)}")
        rows = F.normalize(embeddings.detach(), dim=-1)
        generator = torch.Generator().manual_seed(seed)
        centres = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
        nearest = None
        for _ in range(rounds):
            found = (rows @ centres.T).argmax(1)
            if nearest is not None and torch.equal(found, nearest):
                break
            nearest = found
            sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
            empty = torch.bincount(nearest, minlength=count) == 0
            centres = torch.where(empty[:, None], centres, F.normalize(sums, dim=-1))
        return centres

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: (batch, features).
            teacher: In the same shape.

        Returns:
            A scalar.
        """
        s, t = F.normalize(student, dim=-1), F.normalize(teacher.detach(), dim=-1)
        anchors = self.anchors.to(s)
        p, q = (F.log_softmax(x @ anchors.T / self.temperature, -1) for x in (t, s))
        loss = F.kl_div(q, p, log_target=True, reduction="batchmean")
        if self.relations:
            loss = loss + self.relations * (s @ s.T - t @ t.T).square().mean()
        return loss

    def agreement(self, student: torch.Tensor, teacher: torch.Tensor) -> float:
        """Share of embeddings that are nearest to the same anchor in both."""
        near = [
            (F.normalize(x.detach(), dim=-1) @ self.anchors.to(x).T).argmax(-1)
            for x in (student, teacher)
        ]
        return float((near[0] == near[1]).float().mean())
