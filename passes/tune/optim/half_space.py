"""HSPG and DHSPG: a mixed penalty shrinks groups, and a half-space projection makes them zero.

Both minimise ``f(x) + sum lambda_g ||x_g||``. A group is projected to zero when a step would take
it out of the half space ``{y : y . x_g >= epsilon ||x_g||^2}``, that is, past the origin as seen
from where it is (OTO, arXiv 2107.07467; OTOv2, arXiv 2303.06862).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchlathe.ir import OptionError
from torchlathe.passes.analysis.families import Families
from torchlathe.passes.tune.optim.groups import Sums
from torchlathe.passes.tune.optim.hesso import left_after
from torchlathe.passes.tune.optim.saliency import cosines
from torchlathe.passes.tune.optim.sparse_optimizer import (
    GONE,
    KEPT,
    LEAVING,
    Memory,
    SparseOptimizer,
    rates_of,
)

__all__ = ["DHSPG", "HSPG", "outside_half_space", "penalties", "redundancy"]


def outside_half_space(
    products: torch.Tensor, squares: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Which groups the projection makes zero; it never makes one larger, and twice is once.

    Args:
        products: Shape (groups,), inner products of the trial points with the points before.
        squares: Shape (groups,), squared norms of the points before.
        epsilon: In [0, 1): the higher, the more is projected.

    Returns:
        Shape (groups,) bool: ``y . x < epsilon ||x||^2``.
    """
    return products < epsilon * squares


def penalties(sums: Sums, least: float, amplify: float, most: float) -> torch.Tensor:
    """DHSPG's lambda of each group.

    For lambda between ``-(x . d) / ||x||`` and ``-||d||^2 ||x|| / (x . d)``, where the product is
    negative, ``-(d + lambda x / ||x||)`` is a descent direction of both f (of which d is the
    gradient) and the norm of the group; elsewhere any lambda makes the norm smaller.

    Args:
        sums: Of weights x and directions d.
        least: Lambda where no more is needed.
        amplify: Times the lower end of the window.
        most: The largest lambda, over ``least``.

    Returns:
        Shape (groups,).
    """
    norms = sums.weights.sqrt()
    grows = (sums.products < 0) & (norms > 0)
    products = torch.where(grows, sums.products, -torch.ones_like(norms))
    scale = torch.where(grows, norms, torch.ones_like(norms))
    low = -products / scale
    high = -sums.directions * scale / products
    wanted = (amplify * low).clamp(least, least * most)
    inside = torch.where(wanted >= high, (low + high) / 2, wanted)
    return torch.where(grows, inside, torch.full_like(norms, least))


def redundancy(sums: Sums) -> torch.Tensor:
    """DHSPG's score by which groups are split: the highest are penalised; shape (groups,).

    Half the cosine of x and d, which is high where steps make the group smaller anyway, and half
    the inverse of the mean magnitude; each over its norm over all groups.
    """
    inverse = 1 / (sums.weights.sqrt() / sums.sizes.clamp_min(1) + 1e-6)
    parts = (cosines(sums), inverse)
    return sum((0.5 * v / (v.norm() + 1e-8) for v in parts), torch.zeros_like(inverse))


class _HalfSpace(SparseOptimizer):
    """Penalty, projection, and a last stretch in which the exact target is met."""

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        penalty: float | None = None,
        epsilon: float = 0.0,
        settle_steps: int | None = None,
        **options: Any,
    ) -> None:
        where = type(self).__name__
        if options.get("divisible", 1) != 1:
            raise OptionError(
                f"{where} projects groups one by one, and cannot keep round numbers of them",
                hint="use HESSO for divisible",
            )
        super().__init__(groups, model, **options)
        # All others divide each direction by how large it usually is, as Adam does.
        plain = (torch.optim.SGD, torch.optim.ASGD, torch.optim.LBFGS)
        self.adaptive = not isinstance(self.base, plain)
        usual = 1e-2 if self.adaptive else 1e-3
        self.penalty = usual if penalty is None else penalty
        self.epsilon = epsilon
        usual_steps = max(1, self.pruning_steps // 4)
        self.settle_steps = usual_steps if settle_steps is None else settle_steps
        if not 0 <= epsilon < 1 or self.penalty < 0:
            raise OptionError(
                f"epsilon is {epsilon} and penalty {self.penalty}, but they must be in [0, 1) and "
                "at least 0",
                where=where,
            )
        if not 0 <= self.settle_steps <= self.pruning_steps:
            raise OptionError(
                f"settle_steps is {settle_steps}, but must be from 0 to pruning_steps",
                where=where,
            )
        self.penalised = torch.zeros(self.table.count, dtype=torch.bool)

    # -- stepping ----------------------------------------------------------------------------

    @property
    def _now(self) -> int:
        """Steps since pruning began."""
        return self.steps - self.start_step

    @property
    def _settles_at(self) -> int:
        return self.pruning_steps - self.settle_steps

    def _before(self) -> Memory | None:
        now, last = self._now, self._settles_at - (not self.settle_steps)
        return self._remember() if 0 <= now <= last and self.zero_groups < self.target else None

    def _after(self, before: Memory | None, loss: Any) -> None:
        now = self._now
        if before is not None:
            sums = self._sums(before)
            if now == 0:
                self._begin(sums)
            if now < self._settles_at:
                self._project(before, sums)
            else:
                self._settle(sums)
        if self._settles_at <= now < self.pruning_steps:
            step = now - self._settles_at
            self._multiply(left_after(step, self.settle_steps))
            if step == self.settle_steps - 1:
                self._set_phase(self.phase == LEAVING, GONE)
        else:
            self._multiply()

    def _begin(self, sums: Sums) -> None:
        """Which groups are penalised."""
        self.penalised = torch.ones_like(self.penalised)

    def _penalties(self, sums: Sums) -> torch.Tensor:
        return torch.full_like(sums.weights, self.penalty)

    def _projects(self) -> bool:
        return True

    def _project(self, before: Memory, sums: Sums) -> None:
        """Shrink what is penalised along itself, and zero what leaves its half space."""
        active = self.penalised & (self.phase == KEPT) & (sums.weights > 0)
        norms = sums.weights.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        # Times the rate of each parameter, as the direction of the step is.
        shrink = torch.where(active, self._penalties(sums) / norms, 0.0)
        self.table.subtract(shrink, before, rates_of(self.param_groups))
        if not self._projects():
            return
        products = sums.weights - sums.moved - shrink * sums.rated
        outside = active & outside_half_space(products, sums.weights, self.epsilon)
        # Never more than are still to go: of n groups at a share of s, floor(n (target - s)).
        room = min(self.target - self.zero_groups, int(outside.sum()))
        if room > 0:
            ratio = (products / norms**2).masked_fill(~outside, torch.inf)
            found = self._lowest(ratio, room, self.phase != KEPT)
            self._set_phase(found & outside, GONE)

    def _settle(self, sums: Sums) -> None:
        """Choose what the last stretch takes to zero, so that the target is met."""
        gone = self.phase != KEPT
        missing = self.target - int(gone.sum())
        sizes = sums.weights.sqrt() / sums.sizes.clamp_min(1).sqrt()
        # Those that were penalised first, by how much of them is left.
        scores = sizes / sizes.max().clamp_min(1e-30) + (~self.penalised).double()
        self.penalised.zero_()
        if missing > 0:
            self._set_phase(self._lowest(scores, missing, gone), LEAVING)

    # -- state -------------------------------------------------------------------------------

    def sparse_state(self) -> dict[str, Any]:
        """Where the pruning is, and which groups are penalised."""
        own = {"penalised": self.penalised.clone(), "epsilon": self.epsilon}
        return super().sparse_state() | own

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        self.penalised = state["penalised"].clone().to("cpu", torch.bool)
        self.epsilon = float(state["epsilon"])


class HSPG(_HalfSpace):
    """Half-space stochastic projected gradient (OTOv1).

    Every group is penalised alike. In the first stage that is all; after ``project_step`` steps
    of pruning, groups that leave their half space become zero, until the target is met. Where
    that stalls, epsilon grows by 0.1 every ``adapt_every`` steps, up to 0.999. The last
    ``settle_steps`` take the smallest of what is still missing to zero along a line, which is own,
    so that the target is exact.

    Args:
        groups: See `SparseOptimizer`, as for all that is not here.
        model: The module.
        penalty: Lambda; 1e-2, or 1e-3 where the base is SGD.
        epsilon: Of the half space, in [0, 1), to begin with.
        project_step: Steps of pruning before the first projection; a quarter of them by default.
        adapt_every: Steps after which epsilon grows if the sparsity grew by less than 0.01.
        settle_steps: Steps of the last stretch; a quarter by default, and one at least; 0 for none.
        options: Of `SparseOptimizer`, and of the base.

    Source: arXiv 2107.07467, algorithm 2 and its code; the count of projected groups corrected.
    """

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        penalty: float | None = None,
        epsilon: float = 0.0,
        project_step: int | None = None,
        adapt_every: int = 200,
        settle_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            groups, model, penalty=penalty, epsilon=epsilon, settle_steps=settle_steps, **options
        )
        self.project_step = self.pruning_steps // 4 if project_step is None else project_step
        if self.project_step < 0 or adapt_every < 1:
            raise OptionError(
                f"project_step is {project_step} and adapt_every {adapt_every}, but they must be "
                "at least 0 and 1",
                where="HSPG",
            )
        self.adapt_every = adapt_every
        self._seen = 0.0

    def _projects(self) -> bool:
        since = self._now - self.project_step
        if since > 0 and since % self.adapt_every == 0:
            if self.group_sparsity - self._seen < 0.01:
                self.epsilon = min(0.999, self.epsilon + 0.1)
            self._seen = self.group_sparsity
        return since >= 0

    def sparse_state(self) -> dict[str, Any]:
        """Where the pruning is, and the sparsity that epsilon was last judged by."""
        return super().sparse_state() | {"seen": self._seen}

    def _take(self, state: Mapping[str, Any]) -> None:
        super()._take(state)
        self._seen = float(state["seen"])


class DHSPG(_HalfSpace):
    """Dual half-space projected gradient (OTOv2).

    At ``start_step`` the groups are split once, by `redundancy`. Those that matter train as ever;
    the others are penalised, by a lambda that makes each smaller without working against the loss
    (`penalties`), and become zero when they leave their half space, until the target is met. The
    last ``settle_steps`` take the smallest of what is still missing to zero along a line, which
    is own, so that the target is exact.

    Args:
        groups: See `SparseOptimizer`, as for all that is not here.
        model: The module.
        penalty: The least lambda; 1e-2, or 1e-3 where the base is SGD.
        amplify: Times the lower end of the window; 20, or 2 where the base is SGD.
        most: The largest lambda over the least; 1,000, or 10 where the base is SGD.
        epsilon: Of the half space, in [0, 1).
        tolerance: Share of all groups that is penalised beyond the target.
        settle_steps: Steps of the last stretch; a quarter by default, and one at least; 0 for none.
        options: Of `SparseOptimizer`, and of the base.

    Source: arXiv 2303.06862, algorithm 3 and its code.
    """

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        penalty: float | None = None,
        amplify: float | None = None,
        most: float | None = None,
        epsilon: float = 0.0,
        tolerance: float = 0.05,
        settle_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            groups, model, penalty=penalty, epsilon=epsilon, settle_steps=settle_steps, **options
        )
        if not 0 <= tolerance < 1:
            raise OptionError(f"tolerance is {tolerance}, but must be in [0, 1)", where="DHSPG")
        self.amplify = amplify if amplify is not None else (20.0 if self.adaptive else 2.0)
        self.most = most if most is not None else (1e3 if self.adaptive else 10.0)
        self.tolerance = tolerance

    def _begin(self, sums: Sums) -> None:
        count = min(self.target + int(self.table.count * self.tolerance), self.table.count - 1)
        self.penalised = self._lowest(-redundancy(sums), count, self.phase != KEPT)

    def _penalties(self, sums: Sums) -> torch.Tensor:
        return penalties(sums, self.penalty, self.amplify, self.most)
