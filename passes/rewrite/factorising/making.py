"""From a plan to the tensors that stand for what it splits; one site's matrices at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchlathe.ir import Program
from torchlathe.passes.rewrite.factorising.conv_splits import cp_split, spatial_split, tucker_split
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.remainders import remainder_split
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.splits import Split, joint_split, output_error, split

__all__ = ["Factors", "error_scales", "make"]


@dataclass(frozen=True, eq=False)
class Factors:
    """The tensors of a plan.

    Attributes:
        shared: Those that come first, in order of execution.
        own: Per site the last one.
        shifts: Per site what its bias takes up, (outs,) float64; None where it stays.
        error: As of the plan, computed.
        rows: Rows of the matrix that are kept as they are, in the layout of the last factor but
            with the inputs of the first; None if there are none.
        order: Where each output is among those of the last factor with the kept rows behind them,
            (outs,) int32.
    """

    shared: tuple[torch.Tensor, ...]
    own: tuple[torch.Tensor, ...]
    shifts: tuple[torch.Tensor | None, ...]
    error: float
    rows: torch.Tensor | None = None
    order: torch.Tensor | None = None


def make(plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int) -> Factors:
    """Compute the factors of a plan; the memory of one site at a time."""
    if len(plan.sites) > 1:
        return _joint(plan, program, metrics, damping, seed)
    if plan.form != "matrix":
        return _kernels(plan, program, metrics)
    if plan.kept:
        return _with_rows(plan, program, metrics, damping, seed)
    (site,) = plan.sites
    matrices = site.matrices(program.tensor(site.weight).detach())
    known = plan.method != "svd"
    found = [
        split(
            matrix,
            plan.ranks[0],
            inputs=metrics.norm([site], group) if known else None,
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
    down, up = _laid_out(site, found)
    return Factors((down,), (up,), (shift,), error)


def _with_rows(
    plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int
) -> Factors:
    """A product, and the rows that it misses most as they are."""
    (site,) = plan.sites
    matrices = site.matrices(program.tensor(site.weight).detach())
    known = plan.method != "svd"
    groups = range(len(matrices))
    found = remainder_split(
        list(matrices),
        plan.ranks[0],
        plan.kept,
        inputs=[metrics.moment([site], group) if known else None for group in groups],
        rows=[metrics.weights(site, group) if known else None for group in groups],
        damping=damping,
        seed=seed,
    )
    assert found.parts is not None, "a plan that keeps every row is not smaller"
    error = _share(found.error, found.energy)
    products = [(found.product(group),) for group in groups]
    if not known and metrics.inputs:
        product = torch.stack([value for (value,) in products])
        error = _relative(site, matrices, product, metrics)
    shift = metrics.shift([site], 0, matrices, products)
    down, up = _laid_out(site, found.parts)
    rows = torch.stack(list(found.kept)) if site.kind == "experts" else found.kept[0]
    if site.kind == "convolution":
        rows = rows.reshape(len(rows), *site.shape[1:])
    return Factors((down,), (up,), (shift,), error, rows, found.order.int())


def _laid_out(site: Site, parts: Sequence[Split]) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of all groups in the layout of the site's calls."""
    down = torch.cat([part.down for part in parts])
    up = torch.cat([part.up for part in parts])
    if site.kind == "experts":
        down = down.reshape(site.groups, -1, site.ins)
        up = up.reshape(site.groups, -1, parts[0].rank)
    if site.kind == "convolution":
        ones = [1] * len(site.kernel)
        down = down.reshape(down.shape[0], site.shape[1], *site.kernel)
        up = up.reshape(*up.shape, *ones)
    return down.contiguous(), up.contiguous()


def _kernels(plan: Plan, program: Program, metrics: Metrics) -> Factors:
    """Forms of convolutions that follow the axes of the kernel."""
    (site,) = plan.sites
    weight = program.tensor(site.weight).detach()
    matrices = site.matrices(weight)
    kernels: tuple[torch.Tensor, ...]
    if plan.form == "spatial":
        kernels = spatial_split(weight, plan.ranks[0])
        composed = torch.einsum("ricx,oryl->oicl", *kernels)
    elif plan.form == "tucker":
        kernels = tucker_split(weight, plan.ranks[0], plan.ranks[1])
        first, core, last = kernels
        mixed = (last.flatten(1) @ core.flatten(1)).reshape(-1, *core.shape[1:])
        composed = torch.einsum("or...,ri->oi...", mixed, first.flatten(1))
    else:
        kernels = cp_split(weight, plan.ranks[0])
        first, core, last = (kernel.flatten(1) for kernel in kernels)
        composed = torch.einsum("or,rk,ri->oik", last, core, first).reshape(weight.shape)
    product = site.matrices(composed)
    shift = metrics.shift([site], 0, matrices, [(product[0],)])
    error = _relative(site, matrices, product, metrics)
    return Factors(kernels[:-1], kernels[-1:], (shift,), error)


def _joint(plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int) -> Factors:
    sites = plan.sites
    matrices = [site.matrices(program.tensor(site.weight).detach()) for site in sites]
    weights = [matrix[0] for matrix in matrices]
    inputs = metrics.norm(sites)
    energies = [output_error(w, None, inputs) for w in weights]
    scales = error_scales(sites, energies, metrics)
    own, shared, error, energy = joint_split(
        weights, plan.ranks[0], inputs=inputs, scales=scales, damping=damping, seed=seed
    )
    shifts = tuple(
        metrics.shift(sites, index, matrices[index], [(up, shared)]) for index, up in enumerate(own)
    )
    own = [up.contiguous() for up in own]
    return Factors((shared.contiguous(),), tuple(own), shifts, _share(error, energy))


def error_scales(sites: Sequence[Site], energies: Sequence[float], metrics: Metrics) -> list[float]:
    """Weights of squared errors that make them relative, and worth what they do to the outputs.

    Args:
        sites: Those that are split together.
        energies: Of each, the squared norm.
        metrics: What each is worth.
    """
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
