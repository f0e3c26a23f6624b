"""What shapes training besides a teacher: weights of samples, and condition numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from torchlathe.ir import OptionError
from torchlathe.passes.tune.training.hooks import Hook

__all__ = ["BiasLoss", "condition_gap"]


class BiasLoss(Hook):
    """Cross entropy in which samples count by how much their features vary.

    With ``v_i`` the variance of all elements of the last feature map of sample i, scaled to
    ``(v - min) / (max - min)``, sample i has the weight ``exp(beta v_i) - 1 + alpha``. The weights
    get no gradient. Where all variances are equal, they count as 0.

    Source: Abrahamyan et al., arXiv 2107.11170; the normalisation by the least variance so far and
    the largest of the batch is that of public copies of the official code. `Distill` divides the
    weights by their mean over the batch (own), so that ``bias`` changes which samples count and not
    how much distillation does; there alpha is 0.3, and the rows are of the distillation.

    Args:
        alpha: Weight of the sample with the least variance.
        beta: How much more others count.

    Raises:
        OptionError: A negative one.
    """

    def __init__(self, alpha: float = 0.3, beta: float = 0.3) -> None:
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise OptionError(f"{name} is {value}, but must not be negative")
        self.alpha, self.beta = alpha, beta
        self.least = math.inf

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        """The loss.

        Args:
            logits: (batch, classes).
            labels: (batch,).
            features: (batch, ...), those that the classifier reads.

        Returns:
            A scalar.
        """
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (self.weights(features) * losses).mean()

    def weights(self, features: torch.Tensor) -> torch.Tensor:
        """Of each sample, (batch,); remembers the least variance."""
        spread = features.detach().flatten(1).float().var(1)
        self.least = min(self.least, float(spread.min()))
        width = float(spread.max()) - self.least
        scaled = (spread - self.least) / width if width > 0 else torch.zeros_like(spread)
        return torch.exp(self.beta * scaled) - 1 + self.alpha

    def state(self) -> dict[str, Any]:
        """The least variance so far."""
        return {"least": self.least}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.least = float(state["least"])


def condition_gap(weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """A differentiable bound of how ill-conditioned a matrix is: 0 if all singular values agree.

    ``gap = n log(tr(W'W) / n) - log det(W'W + eps I)`` is the logarithm of the n-th power of the
    ratio of the arithmetic to the geometric mean of the squared singular values, and
    ``log kappa(W) <= log 2 + gap / 2``. Rows and columns of zeros are left out, for with them the
    condition number is infinite by definition.

    Source: Guggenheimer, Edelman and Johnson 1995 for the bound; as a regulariser of sparse
    training it is a reconstruction of TSCNC, whose exact loss was not to be had.

    Args:
        weight: (outs, ...); all other axes count as one.
        eps: Relative to the mean of the squared singular values.

    Returns:
        A scalar, at least 0 up to ``n * eps``.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        rows, columns = matrix.abs().amax(1) > 0, matrix.abs().amax(0) > 0
    matrix = matrix[rows][:, columns]
    if not matrix.numel():
        return weight.sum() * 0
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    size = gram.shape[0]
    scale = gram.diagonal().mean()
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    found: torch.Tensor = -torch.linalg.slogdet(gram / scale + eps * identity).logabsdet
    return found
