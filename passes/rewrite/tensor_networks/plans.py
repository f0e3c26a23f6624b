"""Networks that may stand for one matrix: what each costs and loses, and its cores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log, prod
from typing import Literal

import torch

from torchlathe.passes.rewrite.factorising.splits import output_error
from torchlathe.passes.rewrite.tensor_networks.contracting import row_flops
from torchlathe.passes.rewrite.tensor_networks.fitting import fit
from torchlathe.passes.rewrite.tensor_networks.modes import balanced_modes
from torchlathe.passes.rewrite.tensor_networks.trains import (
    dense,
    full_bonds,
    input_factors,
    tensor_train,
    train_parameters,
)

__all__ = [
    "NetworkKind",
    "NetworkPlan",
    "bond_within",
    "modes_of",
    "network_cores",
    "network_error",
    "network_plan",
    "network_plans",
]

NetworkKind = Literal["tensor-train", "kronecker"]

# Bonds of each layer that an allocation may choose from, and those that are fitted for that.
_GRID = 12
_ANCHORS = (0.25, 0.6)
_PROFILE_STEPS = 4


@dataclass(frozen=True)
class NetworkPlan:
    """One way to write a matrix as a network.

    Attributes:
        kind: ``"kronecker"`` is a train with two sites whose first factor is nearly the whole of
            the outputs and the second nearly the whole of the inputs.
        out_modes: Factors of the outputs, row-major, one for each site.
        in_modes: Factors of the inputs.
        bonds: Between neighbouring sites; for two sites the number of Kronecker products.
        parameters: Elements of all cores.
        flops: For each row of the input, contracted core by core.
        error: Squared error of the outputs over their square; NaN if it is not known yet.
    """

    kind: NetworkKind
    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    bonds: tuple[int, ...]
    parameters: int
    flops: int
    error: float = float("nan")

    @property
    def legs(self) -> str:
        """Shapes of the sites as text: ``16x16 * 24x24``."""
        pairs = zip(self.out_modes, self.in_modes, strict=True)
        return " * ".join(f"{outs}x{ins}" for outs, ins in pairs)


def modes_of(
    kind: NetworkKind,
    outs: int,
    ins: int,
    *,
    sites: int = 2,
    skew: int = 2,
    structures: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Factors of outputs and inputs; None where the extents have none.

    Args:
        kind: A train has factors that are near to each other. A Kronecker sum has a small one,
            ``skew``, at either side: with 1 in its place it would be a product of two matrices,
            and it takes ``skew`` times the FLOPs of one with as many parameters, which balanced
            factors take many times over.
        outs: Rows of the matrix.
        ins: Columns.
        sites: Of a train.
        skew: Of a Kronecker sum.
        structures: How the axes are cut already; see `balanced_modes`.
    """
    if kind == "kronecker":
        if outs % skew or ins % skew or outs == skew or ins == skew:
            return None
        return (outs // skew, skew), (skew, ins // skew)
    found = (
        balanced_modes(outs, sites, structures[0]),
        balanced_modes(ins, sites, structures[1]),
    )
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def network_plan(
    kind: NetworkKind,
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    bond: int,
    error: float = float("nan"),
) -> NetworkPlan | None:
    """The plan with at most this bond everywhere; None where it would not be smaller."""
    if bond < 1:
        return None
    bonds = tuple(min(bond, full) for full in full_bonds(out_modes, in_modes))
    count = train_parameters(out_modes, in_modes, bonds)
    if count >= prod(out_modes) * prod(in_modes):
        return None
    flops = row_flops(out_modes, in_modes, bonds)
    return NetworkPlan(kind, tuple(out_modes), tuple(in_modes), bonds, count, flops, error)


def bond_within(out_modes: Sequence[int], in_modes: Sequence[int], parameters: float) -> int:
    """The largest bond at which the cores hold at most so many parameters; may be 0."""
    full = full_bonds(out_modes, in_modes)
    low, high = 0, max(full)
    while low < high:
        middle = (low + high + 1) // 2
        bonds = [min(middle, most) for most in full]
        if train_parameters(out_modes, in_modes, bonds) <= parameters:
            low = middle
        else:
            high = middle - 1
    return low


def network_plans(
    matrix: torch.Tensor,
    moment: torch.Tensor | None,
    *,
    kinds: Sequence[NetworkKind] = ("tensor-train", "kronecker"),
    damping: float = 1e-6,
    sites: int = 2,
    structures: tuple[Sequence[int], Sequence[int]] = ((), ()),
    modes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    most: int | None = None,
    count: int = _GRID,
    sweeps: int = 2,
    seed: int = 0,
) -> list[NetworkPlan]:
    """Plans over a grid of bonds, each with its error.

    Cores are fitted to the data at two of the bonds, and the gain there is taken for that of the
    others, so that their errors are estimates; `network_cores` and `network_error` tell the truth.

    Args:
        matrix: Shape (outs, ins), floating.
        moment: Mean of ``x x'``, (ins, ins); None for the plain norm, in which errors are exact.
        kinds: Which networks.
        damping: As `network_cores` takes it.
        sites: Of the trains.
        structures: As `modes_of` takes them.
        modes: Factors for all kinds, instead of those of `modes_of`.
        most: The largest bond.
        count: Bonds of each kind.
        sweeps: As `network_cores` takes it.
        seed: Of the randomised method.

    Returns:
        Plans that are smaller than the matrix; none where an extent has no factors.
    """
    found: list[NetworkPlan] = []
    for kind in kinds:
        outs, ins = matrix.shape
        own = modes or modes_of(kind, outs, ins, sites=sites, structures=structures)
        if own is None:
            continue
        largest = bond_within(*own, matrix.numel() - 1)
        largest = largest if most is None else min(largest, most)
        plans = [network_plan(kind, *own, bond) for bond in _grid(largest, count)]
        usable = [plan for plan in plans if plan is not None]
        errors = _unfitted(usable, matrix, moment, seed)
        gains = [1.0] * len(usable)
        if moment is not None and sweeps:
            gains = _gains(usable, errors, matrix, moment, damping, sweeps, seed)
        pairs = zip(usable, errors, gains, strict=True)
        found += [replace(plan, error=error * gain) for plan, error, gain in pairs]
    return found


def network_cores(
    plan: NetworkPlan,
    matrix: torch.Tensor,
    moment: torch.Tensor | None,
    *,
    damping: float = 1e-6,
    sweeps: int = 2,
    steps: int = 8,
    seed: int = 0,
) -> list[torch.Tensor]:
    """The cores of a plan, (left bond, o_k, i_k, right bond), in the dtype of the matrix.

    Args:
        plan: What to make.
        matrix: Shape (outs, ins).
        moment: As `network_plans` takes it.
        damping: Added to the diagonal of the moment, relative to its mean.
        sweeps: Of the fit to the data; 0 for the plain train.
        steps: Of each core in a sweep.
        seed: Of the randomised method.
    """
    train = tensor_train(matrix, plan.out_modes, plan.in_modes, bond=plan.bonds, seed=seed)
    if moment is None or not sweeps:
        return list(train.cores)
    factors = input_factors(moment, plan.in_modes, damping)
    return fit(
        train.cores,
        matrix.detach(),
        moment,
        factors=factors,
        damping=damping,
        sweeps=sweeps,
        steps=steps,
    )


def network_error(
    cores: Sequence[torch.Tensor], matrix: torch.Tensor, moment: torch.Tensor | None
) -> float:
    """Squared error of the outputs over their square, in float64."""
    wide = [core.double() for core in cores]
    return _relative(matrix, dense(wide), moment)


def _relative(matrix: torch.Tensor, other: torch.Tensor, moment: torch.Tensor | None) -> float:
    whole = output_error(matrix, torch.zeros_like(matrix), moment)
    return max(output_error(matrix, other, moment), 0.0) / whole if whole > 0 else 0.0


def _grid(most: int, count: int) -> list[int]:
    """Up to so many bonds from 1 to the most, the first ones closer."""
    if most <= count:
        return list(range(1, most + 1))
    return sorted({max(1, round(most * (k / count) ** 1.25)) for k in range(1, count + 1)})


def _unfitted(
    plans: Sequence[NetworkPlan],
    matrix: torch.Tensor,
    moment: torch.Tensor | None,
    seed: int,
) -> list[float]:
    """Errors of the plain trains; those of two sites come from one decomposition."""
    if not plans:
        return []
    modes = plans[0].out_modes, plans[0].in_modes
    if len(modes[0]) > 2:
        errors = []
        for plan in plans:
            train = tensor_train(matrix, *modes, bond=plan.bonds, seed=seed)
            exact = train.error / train.energy if train.energy > 0 else 0.0
            error = exact if moment is None else _relative(matrix, train.matrix, moment)
            errors.append(error)
        return errors
    train = tensor_train(matrix, *modes, bond=plans[-1].bonds, seed=seed)
    first, second = train.cores
    errors, rest, done = [], matrix.detach().clone(), 0
    for plan in plans:
        (bond,) = plan.bonds
        rest -= dense([first[..., done:bond], second[done:bond]])
        done = bond
        errors.append(_relative(matrix, matrix.detach() - rest, moment))
    return errors


def _gains(
    plans: Sequence[NetworkPlan],
    errors: Sequence[float],
    matrix: torch.Tensor,
    moment: torch.Tensor,
    damping: float,
    sweeps: int,
    seed: int,
) -> list[float]:
    """By how much fitting lowers each error, from what it does at the anchors."""
    if not plans:
        return []
    shares = [plan.parameters / matrix.numel() for plan in plans]
    known: dict[int, float] = {}
    for anchor in _ANCHORS:
        place = min(range(len(plans)), key=lambda i: abs(shares[i] - anchor))
        if place in known or errors[place] <= 0:
            continue
        cores = network_cores(
            plans[place],
            matrix,
            moment,
            damping=damping,
            sweeps=sweeps,
            steps=_PROFILE_STEPS,
            seed=seed,
        )
        gain = network_error(cores, matrix, moment) / errors[place]
        known[place] = min(max(gain, 1e-6), 1.0)
    points = sorted((shares[place], log(gain)) for place, gain in known.items())
    return [exp(_between(points, share)) for share in shares]


def _between(points: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between points, constant beyond."""
    if not points:
        return 0.0
    if at <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in itertools.pairwise(points):
        if at <= b:
            return low + (high - low) * (at - a) / (b - a)
    return points[-1][1]
