"""Ways to split one site, or several that read the same input: what each costs and loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from torchlathe.ir import Program
from torchlathe.passes.rewrite.factorising.conv_splits import (
    spatial_split,
    tucker_ranks,
    tucker_split,
)
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.splits import joint_split, output_error, spectrum, split

__all__ = ["Factors", "Form", "Plan", "errors_by_rank", "make", "most_rank", "plan_of", "plans"]

Form = Literal["matrix", "spatial", "tucker"]

# How many ranks of each site an allocation may choose from.
_GRID = 24
_CONV_GRID = 5


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to split.

    Attributes:
        sites: What is split; several share the factor that reads their input.
        method: ``"svd"``, ``"whitened-svd"`` or ``"fisher-weighted"``: the norm.
        form: Of a convolution's factors; ``"matrix"`` for all else.
        ranks: Channels between the factors, one or two.
        parameters: Elements of all factors.
        error: Squared error over squared norm; the mean over the sites by their effects; NaN if it
            is not known yet.
    """

    sites: tuple[Site, ...]
    method: str
    form: Form
    ranks: tuple[int, ...]
    parameters: int
    error: float = float("nan")


@dataclass(frozen=True, eq=False)
class Factors:
    """The tensors of a plan.

    Attributes:
        shared: Those that come first, in order of execution.
        own: Per site the last one.
        shifts: Per site what its bias takes up, (outs,) float64; None where it stays.
        error: As of the plan, computed.
    """

    shared: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]
    shifts: tuple[torch.Tensor | None, ...]
    error: float


def plan_of(
    sites: Sequence[Site], method: str, form: Form, rank: int, error: float = float("nan")
) -> Plan | None:
    """The plan of a rank; None where it would not be smaller.

    For ``"tucker"`` the rank is that of a matrix split with as many parameters.
    """
    first = sites[0]
    whole = sum(site.parameters for site in sites)
    ranks: tuple[int, ...] = (rank,)
    if rank < 1:
        return None
    if form == "spatial":
        outs, ins, tall, wide = first.shape
        count = rank * (ins * tall + outs * wide)
    elif form == "tucker":
        outs, ins = first.shape[:2]
        positions = first.parameters // (outs * ins)
        ranks = tucker_ranks(outs, ins, positions, rank * (first.ins + first.outs))
        count = ranks[0] * ins + ranks[0] * ranks[1] * positions + ranks[1] * outs
        if not all(ranks):
            return None
    else:
        count = rank * first.groups * (first.ins + sum(site.outs for site in sites))
    if count >= whole:
        return None
    return Plan(tuple(sites), method, form, ranks, count, error)


def most_rank(sites: Sequence[Site], form: Form = "matrix") -> int:
    """The largest rank whose plan is smaller than what is there."""
    first = sites[0]
    whole = sum(site.parameters for site in sites)
    if form == "spatial":
        outs, ins, tall, wide = first.shape
        each = ins * tall + outs * wide
    else:
        each = first.groups * (first.ins + sum(site.outs for site in sites))
    return max((whole - 1) // each, 0)


# -- making ------------------------------------------------------------------------------------


def make(plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int) -> Factors:
    """Compute the factors of a plan; the memory of one site at a time."""
    if len(plan.sites) > 1:
        return _joint(plan, program, metrics, damping, seed)
    (site,) = plan.sites
    weight = program.tensor(site.weight).detach()
    matrices = site.matrices(weight)
    if plan.form != "matrix":
        *shared, last = (
            spatial_split(weight, plan.ranks[0])
            if plan.form == "spatial"
            else tucker_split(weight, plan.ranks[0], plan.ranks[1])
        )
        product = site.matrices(_composed(*shared, last))
        shift = metrics.shift([site], 0, matrices, [(product[0],)])
        error = _relative(site, matrices, product, metrics)
        return Factors(tuple(shared), (last,), (shift,), error)
    known = plan.method != "svd"
    found = [
        split(
            matrix,
            plan.ranks[0],
            inputs=metrics.moment([site], group) if known else None,
            rows=metrics.weights(site, group) if known else None,
            damping=damping,
            seed=seed,
        )
        for group, matrix in enumerate(matrices)
    ]
    error = _share(sum(part.error for part in found), sum(part.energy for part in found))
    if not known and metrics.inputs:
        product = torch.stack([part.product for part in found])
        error = _relative(site, matrices, product, metrics)
    shift = metrics.shift([site], 0, matrices, [(part.up, part.down) for part in found])
    down = torch.cat([part.down for part in found])
    up = torch.cat([part.up for part in found])
    if site.kind == "experts":
        down = down.reshape(site.groups, -1, site.ins)
        up = up.reshape(site.groups, site.outs, -1)
    if site.kind == "convolution":
        ones = [1] * len(site.kernel)
        down = down.reshape(down.shape[0], site.shape[1], *site.kernel)
        up = up.reshape(*up.shape, *ones)
    return Factors((down.contiguous(),), (up.contiguous(),), (shift,), error)


def _composed(*kernels: torch.Tensor) -> torch.Tensor:
    """The kernel that two or three convolutions in turn amount to."""
    if len(kernels) == 2:
        return torch.einsum("ricx,oryl->oicl", *kernels)
    first, core, last = kernels
    mixed = (last.flatten(1) @ core.flatten(1)).reshape(-1, *core.shape[1:])
    return torch.einsum("or...,ri->oi...", mixed, first.flatten(1))


def _joint(plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int) -> Factors:
    sites = plan.sites
    matrices = [site.matrices(program.tensor(site.weight).detach()) for site in sites]
    weights = [matrix[0] for matrix in matrices]
    inputs = metrics.moment(sites)
    energies = [output_error(w, torch.zeros_like(w), inputs) for w in weights]
    scales = _scales(sites, energies, metrics)
    own, shared, error, energy = joint_split(
        weights, plan.ranks[0], inputs=inputs, scales=scales, damping=damping, seed=seed
    )
    shifts = tuple(
        metrics.shift(sites, index, matrices[index], [(up, shared)]) for index, up in enumerate(own)
    )
    own = [up.contiguous() for up in own]
    return Factors((shared.contiguous(),), tuple(own), shifts, _share(error, energy))


def _scales(sites: Sequence[Site], energies: Sequence[float], metrics: Metrics) -> list[float]:
    """Weights of squared errors that make them relative, and worth what they do to the outputs."""
    pairs = zip(sites, energies, strict=True)
    return [metrics.effect(site) / energy if energy > 0 else 0.0 for site, energy in pairs]


def _relative(site: Site, before: torch.Tensor, after: torch.Tensor, metrics: Metrics) -> float:
    """Squared error of the outputs over their square, by the moments of the inputs if known."""
    whole = lost = 0.0
    for group, (old, new) in enumerate(zip(before, after, strict=True)):
        moment = metrics.moment([site], group)
        moment = None if moment is None else moment.float()
        lost += _energy((old.double() - new.double()).float(), moment)
        whole += _energy(old.float(), moment)
    return _share(lost, whole)


def _energy(matrix: torch.Tensor, moment: torch.Tensor | None) -> float:
    """tr(M A M'): a sum of squares, for which float32 is exact enough, and twice as fast."""
    read = matrix if moment is None else matrix @ moment
    return max(float((read * matrix).sum(dtype=torch.float64)), 0.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


# -- profiles ----------------------------------------------------------------------------------


def plans(
    sites: Sequence[Site],
    methods: Sequence[str],
    forms: Sequence[Form],
    program: Program,
    metrics: Metrics,
    damping: float,
) -> Iterator[Plan]:
    """Plans over a grid of ranks, each with its error in the norm of the outputs.

    Args:
        sites: One, or several that read the same input.
        methods: Norms in which to split.
        forms: Of the factors; those that do not fit the site are left out.
        program: Where the weights are.
        metrics: The norm that errors are told in.
        damping: As `make` gets it.
    """
    for form in forms:
        if form != "matrix":
            yield from _convolution_plans(sites[0], form, program, metrics)
            continue
        ranks = _grid(most_rank(sites), _GRID)
        for method in methods:
            errors = errors_by_rank(sites, method, program, metrics, damping)
            for rank in ranks:
                found = plan_of(
                    sites, method, form, rank, float(errors[min(rank, len(errors) - 1)])
                )
                if found is not None:
                    yield found


def _grid(most: int, count: int) -> list[int]:
    """Up to so many ranks from 1 to the most, in equal steps, the first ones closer."""
    if most <= count:
        return list(range(1, most + 1))
    return sorted({max(1, round(most * (k / count) ** 1.25)) for k in range(1, count + 1)})


def errors_by_rank(
    sites: Sequence[Site], method: str, program: Program, metrics: Metrics, damping: float
) -> torch.Tensor:
    """Relative squared error at every rank from 0 on, in the norm of the metrics.

    For several sites the mean of their errors by their effects, with the shared factor that is
    best for it.
    """
    if len(sites) > 1:
        return _joint_errors(sites, program, metrics, damping)
    (site,) = sites
    lost: torch.Tensor | None = None
    for group, matrix in enumerate(site.matrices(program.tensor(site.weight).detach())):
        inputs, rows = metrics.moment([site], group), metrics.weights(site, group)
        if method == "svd" and not (inputs is None and rows is None):
            part = _judged(matrix, inputs, rows)
        else:
            part = _tails(spectrum(matrix, inputs=inputs, rows=rows, damping=damping))
        lost = part if lost is None else lost + part
    assert lost is not None
    return lost / lost[0].clamp_min(1e-300)


def _joint_errors(
    sites: Sequence[Site], program: Program, metrics: Metrics, damping: float
) -> torch.Tensor:
    weights = [site.matrices(program.tensor(site.weight).detach())[0] for site in sites]
    inputs = metrics.moment(sites)
    energies = [output_error(w, torch.zeros_like(w), inputs) for w in weights]
    scales = _scales(sites, energies, metrics)
    rows = [
        weight.new_full((weight.shape[0],), scale, dtype=torch.float64)
        for weight, scale in zip(weights, scales, strict=True)
    ]
    values = spectrum(torch.cat(weights), inputs=inputs, rows=torch.cat(rows), damping=damping)
    lost = _tails(values)
    return lost / lost[0].clamp_min(1e-300)


def _tails(values: torch.Tensor) -> torch.Tensor:
    """What is left out at each rank: sums from the end, with 0 last."""
    sums = values.flip(0).cumsum(0).flip(0)
    return torch.cat([sums, sums.new_zeros(1)])


def _judged(
    matrix: torch.Tensor, inputs: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """Errors of the plain split in another norm, at every rank."""
    wide = matrix.double()
    found = split(wide, min(wide.shape), randomised=False)
    if rows is not None:
        # W - W~ = sum of u_j d_j' over the j left out, with orthogonal d_j.
        return _tails((rows @ found.up.square()) * found.down.square().sum(1))
    # For orthonormal U, what U_r U_r' W loses is tr(W A W') less the diagonal of U' W A W' U.
    left = found.up / found.up.norm(dim=0).clamp_min(1e-300)
    read = wide if inputs is None else wide @ inputs
    caught = ((left.T @ read) * (left.T @ wide)).sum(1)
    whole = float((read * wide).sum())
    return (whole - torch.cat([caught.new_zeros(1), caught.cumsum(0)])).clamp_min(0)


def _convolution_plans(
    site: Site, form: Form, program: Program, metrics: Metrics
) -> Iterator[Plan]:
    if site.kind != "convolution" or site.groups > 1:
        return
    kernel = site.kernel
    if (form == "spatial" and (len(kernel) != 2 or 1 in kernel)) or all(k == 1 for k in kernel):
        return
    for rank in _grid(most_rank([site], form), _CONV_GRID):
        found = plan_of([site], "svd", form, rank)
        if found is not None:
            error = make(found, program, metrics, 0.0, 0).error
            yield Plan(found.sites, "svd", form, found.ranks, found.parameters, error)
