"""Losses between logits: knowledge distillation, and its balanced form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torchlathe.ir import OptionError

__all__ = ["BalancedDistillation", "KnowledgeDistillation", "divergence"]


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``KL(p || q)`` of each row, from log-probabilities.

    Args:
        p: (..., classes), logarithms.
        q: As p.

    Returns:
        Shape (...), in nats.
    """
    # A probability of zero adds nothing, where its logarithm would add 0 * -inf.
    return torch.where(p.isneginf(), torch.zeros_like(p), p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class KnowledgeDistillation:
    """``T^2 KL(p_teacher || p_student)`` at a temperature T, the mean over rows.

    Its gradient with respect to the student's logits is ``T (p_student - p_teacher)`` over the
    number of rows, which does not vanish as T grows. The teacher gets no gradient.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531, section 2.

    Attributes:
        temperature: What logits are divided by.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a temperature that is not positive.

        Raises:
            OptionError: It is not.
        """
        _check_temperature(self.temperature)

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: Logits, (..., classes).
            teacher: Logits, in the same shape.

        Returns:
            A scalar.
        """
        return self.rows(student, teacher.detach()).mean()

    def rows(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of each row, (...); a teacher that is not detached gets gradients too."""
        p, q = (
            F.log_softmax(z.float() if z.dtype.itemsize < 4 else z, -1)
            for z in (teacher / self.temperature, student / self.temperature)
        )
        return self.temperature**2 * divergence(p, q)


@dataclass(frozen=True)
class BalancedDistillation:
    """Both divergences, each sample's weighed by who is the more certain of the two.

    ``T^2 mean(u KL(p_t || p_s) + v KL(p_s || p_t))`` with the entropy gap ``g = H(p_t) - H(p_s)``:
    where it is positive, the student is over-confident, and the forward divergence, which punishes
    missing what the teacher thinks possible, counts ``delta`` times; else the other one does. The
    weights get no gradient.

    Source: BD-KD (arXiv 2212.12965) balances the two per sample by the entropy gap; the weighing
    function is a reconstruction.

    Attributes:
        temperature: What logits are divided by.
        delta: Weight of the favoured divergence, at least 1; 1 weighs both alike.
        sharpness: How fast weights go from one to the other with the gap, in 1/nats; infinite for
            at once.
    """

    temperature: float = 1.0
    delta: float = 2.0
    sharpness: float = float("inf")

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            OptionError: A temperature or sharpness that is not positive, or a delta below 1.
        """
        _check_temperature(self.temperature)
        if not self.delta >= 1:
            raise OptionError(f"delta is {self.delta}, but must be at least 1")
        if not self.sharpness > 0:
            raise OptionError(f"sharpness is {self.sharpness}, but must be positive")

    def __call__(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss.

        Args:
            student: Logits, (..., classes).
            teacher: Logits, in the same shape.

        Returns:
            A scalar.
        """
        return self.rows(student, teacher.detach()).mean()

    def rows(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of each row, (...); a teacher that is not detached gets gradients too."""
        t = F.log_softmax(teacher / self.temperature, -1)
        s = F.log_softmax(student / self.temperature, -1)
        forward, backward = self.weights(s, t)
        both = forward * divergence(t, s) + backward * divergence(s, t)
        return self.temperature**2 * both

    def weights(self, s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the forward and the backward divergence of each row, from log-probabilities."""
        with torch.no_grad():
            gap = _entropy(t) - _entropy(s)
            if self.sharpness == float("inf"):
                over = (gap > 0).to(gap.dtype)
            else:
                over = torch.sigmoid(self.sharpness * gap)
            return 1 + (self.delta - 1) * over, 1 + (self.delta - 1) * (1 - over)


def _entropy(logarithms: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = torch.special.entr(logarithms.exp()).sum(-1)
    return entropy


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise OptionError(f"temperature is {temperature}, but must be positive")
