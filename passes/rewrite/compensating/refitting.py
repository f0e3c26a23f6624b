"""Least squares for one weight: moments, a damped solution, and whether it is worth taking.

Source: own; the regression on the inputs as they have become is that of GPTQ-like methods
(arXiv 2208.11580 for pruning), with a step from the weight as it is instead of from zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

__all__ = ["RIDGES", "Problem", "Solution", "solve"]

# Damping to choose from, relative to the mean of the diagonal of E[x x^T].
RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Inputs up to which the damping is chosen by both halves of the samples, each against the other.
_BOTH_WAYS = 1024


@dataclass
class Problem:
    """``min over W, b of E|y - W x - b|^2`` as sums over samples, in groups.

    Attributes:
        count: Number of samples.
        x: Sum of x, (groups, read).
        y: Sum of y, (groups, outs).
        xx: Sum of x x^T, (groups, read, read).
        yx: Sum of y x^T, (groups, outs, read).
        yy: Sum of the squares of y, (groups, outs).
    """

    count: int = 0
    x: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    y: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    xx: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    yx: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    yy: torch.Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add samples.

        Args:
            x: (groups, samples, read).
            y: (groups, samples, outs).
        """
        # Covariances are differences of large sums, which float32 has no digits for.
        x, y = x.double(), y.double()
        self.count += x.shape[1]
        self.x = self.x + x.sum(1)
        self.y = self.y + y.sum(1)
        self.xx = self.xx + x.transpose(1, 2) @ x
        self.yx = self.yx + y.transpose(1, 2) @ x
        self.yy = self.yy + y.square().sum(1)

    def __add__(self, other: Problem) -> Problem:
        return Problem(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.yx + other.yx,
            self.yy + other.yy,
        )

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """``E|y - W x - b|^2``, summed over outs and groups.

        Args:
            weight: (groups, outs, read) float64.
            bias: (groups, outs) float64.
        """
        n = max(1, self.count)
        quadratic = ((weight @ self.xx) * weight).sum()
        cross = (weight * self.yx).sum()
        linear = (bias * (self.y - (weight @ self.x[:, :, None])[:, :, 0])).sum()
        total = self.yy.sum() - 2 * cross + quadratic - 2 * linear + n * bias.square().sum()
        return max(0.0, float(total) / n)


@dataclass(frozen=True)
class Solution:
    """A refitted weight.

    Attributes:
        weight: (groups, outs, read) float64.
        bias: (groups, outs) float64.
        ridge: The damping that it was found with, relative to the mean of the diagonal.
        before: Mean squared error of the weight as it was, summed over outs.
        after: The same of this one.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    before: float
    after: float


def solve(
    halves: tuple[Problem, Problem],
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    affine: bool,
    ridge: float | None = None,
) -> Solution | None:
    """The best damped step from a weight, if it lowers the error.

    ``W + (Y - W X)(X + ridge * mean diag(X) * I)^-1``, with X = E[x x^T] and Y = E[y x^T], both
    centred if the bias may follow. Without a given ridge, the one is taken whose fit to each half
    of the samples has the least error on the other half, and none at all if every fit there is
    worse than the weight as it is.

    Args:
        halves: The samples, in two parts.
        weight: Where to start, (groups, outs, read) float64.
        bias: (groups, outs) float64.
        affine: Whether the bias may change.
        ridge: Damping, relative.

    Returns:
        None if nothing was gained.
    """
    whole = halves[0] + halves[1]
    before = whole.error(weight, bias)
    if ridge is None:
        ridge = _choose(halves, weight, bias, affine)
        if ridge is None:
            return None
    new_weight, new_bias = _fit(whole, weight, bias, affine, ridge)
    after = whole.error(new_weight, new_bias)
    # The moments are differences of large numbers: a gain below their rounding is none.
    rounding = 1e-13 * float(whole.yy.sum()) / max(1, whole.count)
    if not after < before - rounding:
        return None
    return Solution(new_weight, new_bias, ridge, before, after)


def _choose(
    halves: tuple[Problem, Problem], weight: torch.Tensor, bias: torch.Tensor, affine: bool
) -> float | None:
    """Downhill from the middle of `RIDGES`, for each solution costs the cube of the inputs."""
    if not (halves[0].count and halves[1].count):
        return 1e-2
    # Both ways round, but where that takes long.
    folds = (halves, halves[::-1]) if weight.shape[2] <= _BOTH_WAYS else (halves,)
    still = sum(held.error(weight, bias) for _, held in folds)
    found: dict[int, float] = {}

    def error(index: int) -> float:
        if not 0 <= index < len(RIDGES):
            return math.inf
        if index not in found:
            found[index] = 0.0
            for fitted, held in folds:
                found[index] += held.error(*_fit(fitted, weight, bias, affine, RIDGES[index]))
        return found[index]

    best = RIDGES.index(1e-2)
    step = -1 if error(best - 1) < error(best) else 1
    while error(best + step) < error(best):
        best += step
    return RIDGES[best] if error(best) < still else None


def _fit(
    problem: Problem,
    weight: torch.Tensor,
    bias: torch.Tensor,
    affine: bool,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias for one ridge."""
    n = max(1, problem.count)
    mean_x, mean_y = problem.x / n, problem.y / n
    xx, yx = problem.xx / n, problem.yx / n
    if affine:
        xx = xx - mean_x[:, :, None] * mean_x[:, None, :]
        yx = yx - mean_y[:, :, None] * mean_x[:, None, :]
    else:
        # What the bias adds is not the weight's to explain.
        yx = yx - bias[:, :, None] * mean_x[:, None, :]
    residual = yx - weight @ xx
    scale = xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(xx.shape[1], dtype=xx.dtype, device=xx.device)
    damped = xx + (ridge * scale)[:, None, None] * identity
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool((failed != 0).any()):
        # gelsd takes the least of all solutions, where the default asks for full rank.
        residual, damped = residual.cpu(), damped.cpu()
        step = torch.linalg.lstsq(damped, residual.transpose(1, 2), driver="gelsd").solution
    else:
        step = torch.cholesky_solve(residual.transpose(1, 2), factor)
    new = weight + step.transpose(1, 2).to(weight.device)
    return new, mean_y - (new @ mean_x[:, :, None])[:, :, 0] if affine else bias
