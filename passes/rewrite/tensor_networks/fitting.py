"""Cores fitted to the outputs on data, one after the other: alternating least squares.

With all cores but one fixed, the error ``tr((W - W~) A (W - W~)')`` is a quadratic in that one. It
is lowered by conjugate gradients, so that no system of its size is ever built, and no step makes
it larger. The fit works in the coordinates of the Kronecker norm, in which what is left of ``A`` is
near to the identity, and with all cores but the one orthonormal: both keep the steps few.

Source: own; the gauge is that of the density matrix renormalisation group (White 1992).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchlathe.passes.rewrite.tensor_networks.trains import balanced, roots_of

__all__ = ["fit"]


def fit(
    cores: Sequence[torch.Tensor],
    matrix: torch.Tensor,
    moment: torch.Tensor,
    *,
    factors: Sequence[torch.Tensor],
    damping: float = 0.0,
    sweeps: int = 2,
    steps: int = 8,
) -> list[torch.Tensor]:
    """Cores of the same shapes with no larger error on the data.

    Args:
        cores: Shapes (left bond, o_k, i_k, right bond).
        matrix: What they stand for, (outs, ins).
        moment: Mean of ``x x'``, (ins, ins).
        factors: As `tensor_train` takes them; only the speed depends on them.
        damping: Added to the diagonal of the moment, relative to its mean.
        sweeps: How often to go through all cores, there or back.
        steps: Of conjugate gradients for each core, at most.

    Returns:
        New cores, in the dtype of the matrix, which is also that of the computation.
    """
    if sweeps < 1 or len(cores) < 2:
        return list(cores)
    dtype = matrix.dtype
    pairs = [roots_of(factor.to(matrix.device)) for factor in factors]
    state = [
        torch.einsum("aojb,ji->aoib", core.double(), root).to(dtype)
        for core, (root, _) in zip(cores, pairs, strict=True)
    ]
    backs = [back for _, back in pairs]
    target = _by_legs(matrix.double(), [root for root, _ in pairs]).to(dtype)
    damped = moment.to(matrix.device, torch.float64, copy=True)
    damped.diagonal().add_(damping * float(damped.diagonal().mean()))
    half = _by_legs(damped, backs)
    del damped
    metric = _by_legs(half.T, backs).to(dtype)
    del half
    for site in range(len(state) - 1, 0, -1):
        _push_left(state, site)
    # What is left of the target, times the metric: followed, so that a step takes one product.
    missed = (target - _whole(state)) @ metric
    del target
    for sweep in range(sweeps):
        missed = _sweep(state, missed, metric, steps, forward=sweep % 2 == 0)
    state = [
        torch.einsum("aojb,ji->aoib", c.double(), u) for c, u in zip(state, backs, strict=True)
    ]
    return [core.to(dtype) for core in balanced(state)]


def _by_legs(rows: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """X (M_1 (x) ... (x) M_n), leg by leg: the product of the matrices is never built."""
    legs = rows.unflatten(1, [len(matrix) for matrix in matrices])
    for axis, matrix in enumerate(matrices, 1):
        # One product of two matrices, also where the leg is short.
        moved: torch.Tensor = torch.tensordot(legs, matrix, ([axis], [0]))
        legs = moved.movedim(-1, axis)
    found: torch.Tensor = legs.flatten(1)
    return found


def _whole(state: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix that cores stand for."""
    return _Around(state, 0).out(state[0])


def _sweep(
    state: list[torch.Tensor],
    missed: torch.Tensor,
    metric: torch.Tensor,
    steps: int,
    *,
    forward: bool,
) -> torch.Tensor:
    sites = range(len(state)) if forward else range(len(state) - 1, -1, -1)
    last = len(state) - 1 if forward else 0
    for site in sites:
        state[site], missed = _solve(state, site, missed, metric, steps)
        if site != last and forward:
            _push_right(state, site)
        elif site != last:
            _push_left(state, site)
    return missed


class _Around:
    """All cores but one, as a linear map from that one to the matrix, and back."""

    def __init__(self, state: Sequence[torch.Tensor], site: int) -> None:
        core = state[site]
        self.shape = tuple(core.shape)
        one = core.new_ones(1, 1, 1)
        self.left = _block(state[:site], one)
        self.right = _block(state[site + 1 :], one, rightwards=True)

    def out(self, core: torch.Tensor) -> torch.Tensor:
        """The matrix, (outs, ins)."""
        most, before = self.left.shape[:2]
        _, after, least = self.right.shape
        _, outs, ins, _ = self.shape
        half = torch.tensordot(self.left, core, ([2], [0]))  # O I o i b
        whole = torch.tensordot(half, self.right, ([4], [0]))  # O I o i P J
        whole = whole.permute(0, 2, 4, 1, 3, 5)
        matrix: torch.Tensor = whole.reshape(most * outs * after, before * ins * least)
        return matrix

    def back(self, matrix: torch.Tensor) -> torch.Tensor:
        """The transpose of `out`."""
        most, before = self.left.shape[:2]
        _, after, least = self.right.shape
        _, outs, ins, _ = self.shape
        legs = matrix.reshape(most, outs, after, before, ins, least)
        half = torch.tensordot(self.left, legs, ([0, 1], [0, 3]))  # a o P i J
        core: torch.Tensor = torch.tensordot(half, self.right, ([2, 4], [1, 2]))  # a o i b
        return core


def _block(
    cores: Sequence[torch.Tensor], one: torch.Tensor, *, rightwards: bool = False
) -> torch.Tensor:
    """Cores at one side as one: (outs, ins, bond) at the left, (bond, outs, ins) at the right."""
    if not cores:
        return one
    block = cores[0]
    for core in cores[1:]:
        block = torch.einsum("aoib,bpjc->aopijc", block, core).flatten(3, 4).flatten(1, 2)
    return block.squeeze(3) if rightwards else block.squeeze(0)


def _solve(
    state: Sequence[torch.Tensor],
    site: int,
    missed: torch.Tensor,
    metric: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Conjugate gradients on one core, from what it is; the core, and what is missed with it."""
    around = _Around(state, site)
    core = state[site]
    residual = around.back(missed)
    direction = residual
    size = float((residual * residual).sum())
    least = 1e-12 * size
    for _ in range(steps):
        moved = around.out(direction) @ metric
        image = around.back(moved)
        curvature = float((direction * image).sum())
        if size <= least or curvature <= 0:
            break
        step = size / curvature
        core = core + step * direction
        missed = missed.sub_(moved, alpha=step)
        residual = residual - step * image
        before, size = size, float((residual * residual).sum())
        direction = residual + size / before * direction
    return core, missed


def _push_left(state: list[torch.Tensor], site: int) -> None:
    """Orthonormal rows here; the rest goes into the core before."""
    core = state[site]
    basis, rest = torch.linalg.qr(core.flatten(1).T)
    state[site] = basis.T.reshape(-1, *core.shape[1:])
    state[site - 1] = state[site - 1] @ rest.T


def _push_right(state: list[torch.Tensor], site: int) -> None:
    """Orthonormal columns here; the rest goes into the core behind."""
    core = state[site]
    basis, rest = torch.linalg.qr(core.flatten(0, 2))
    state[site] = basis.reshape(*core.shape[:3], -1)
    state[site + 1] = torch.tensordot(rest, state[site + 1], ([1], [0]))
