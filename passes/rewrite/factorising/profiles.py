"""What plans lose: relative squared errors at every rank, and over a grid to choose from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from torchlathe.ir import Program
from torchlathe.passes.rewrite.factorising.conv_splits import cp_errors
from torchlathe.passes.rewrite.factorising.making import error_scales, make
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.plans import (
    Form,
    Plan,
    can_keep_rows,
    fits,
    most_rank,
    plan_of,
)
from torchlathe.passes.rewrite.factorising.products import Moment, Wide, blocks
from torchlathe.passes.rewrite.factorising.remainders import kept_rows, remainder_split
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.splits import (
    Norm,
    left_vectors,
    output_error,
    spectrum,
    split,
)

__all__ = ["errors_by_rank", "plans"]

# How many ranks of each site an allocation may choose from.
_GRID = 24
_CONV_GRID = 5


def plans(
    sites: Sequence[Site],
    methods: Sequence[str],
    forms: Sequence[Form],
    program: Program,
    metrics: Metrics,
    damping: float,
    *,
    remainders: Sequence[float] = (0.0,),
) -> Iterator[Plan]:
    """Plans over a grid of ranks, each with its error in the norm of the outputs.

    Args:
        sites: One, or several that read the same input.
        methods: Norms in which to split.
        forms: Of the factors; those that do not fit the site are left out.
        program: Where the weights are.
        metrics: The norm that errors are told in.
        damping: As `make` gets it.
        remainders: Shares of the rows that are kept as they are, each a way of its own; where
            none can be kept, the split is without.
    """
    alone = len(sites) == 1 and can_keep_rows(sites[0])
    counts = {kept_rows(sites[0].outs, share) if alone else 0 for share in remainders}
    for form in forms:
        if form != "matrix":
            yield from _convolution_plans(sites[0], form, program, metrics)
            continue
        for method in methods:
            for kept in sorted(counts):
                errors = errors_by_rank(sites, method, program, metrics, damping, kept=kept)
                for rank in _grid(most_rank(sites, kept=kept), _GRID):
                    error = float(errors[min(rank, len(errors) - 1)])
                    found = plan_of(sites, method, form, rank, error, kept=kept)
                    if found is not None:
                        yield found


def _grid(most: int, count: int) -> list[int]:
    """Up to so many ranks from 1 to the most, in equal steps, the first ones closer."""
    if most <= count:
        return list(range(1, most + 1))
    return sorted({max(1, round(most * (k / count) ** 1.25)) for k in range(1, count + 1)})


def errors_by_rank(
    sites: Sequence[Site],
    method: str,
    program: Program,
    metrics: Metrics,
    damping: float,
    *,
    kept: int = 0,
) -> torch.Tensor:
    """Relative squared error at every rank from 0 on, in the norm of the metrics.

    For several sites the mean of their errors by their effects, with the shared factor that is
    best for it. With rows that are kept, those are meant that a split of middling rank misses
    most: a split to another rank chooses its own, and is a little better than told here.
    """
    if len(sites) > 1:
        return _joint_errors(sites, program, metrics, damping)
    (site,) = sites
    matrices = site.matrices(program.tensor(site.weight).detach())
    known = method != "svd"
    others = _other_rows(site, matrices, metrics if known else Metrics(), kept) if kept else None
    lost: torch.Tensor | None = None
    whole = 0.0
    for group, matrix in enumerate(matrices):
        inputs, rows = metrics.norm([site], group), metrics.weights(site, group)
        if others is not None:
            whole += float(_tails(spectrum(matrix, inputs=inputs, rows=rows, damping=damping))[0])
            matrix = matrix[others]
            rows = None if rows is None else rows[others]
        if not known and not (inputs is None and rows is None):
            part = _judged(matrix, inputs, rows)
        else:
            part = _tails(spectrum(matrix, inputs=inputs, rows=rows, damping=damping))
        lost = part if lost is None else lost + part
    assert lost is not None
    return lost / max(float(lost[0]) if others is None else whole, 1e-300)


def _other_rows(site: Site, matrices: torch.Tensor, metrics: Metrics, kept: int) -> torch.Tensor:
    """The rows that are not kept by a split to half of the rank that saves."""
    groups = range(len(matrices))
    found = remainder_split(
        list(matrices),
        max(1, most_rank([site], kept=kept) // 2),
        min(kept, site.outs),
        inputs=[metrics.moment([site], group) for group in groups],
        rows=[metrics.weights(site, group) for group in groups],
    )
    left = torch.ones(site.outs, dtype=torch.bool, device=matrices.device)
    left[found.rows] = False
    return left


def _joint_errors(
    sites: Sequence[Site], program: Program, metrics: Metrics, damping: float
) -> torch.Tensor:
    weights = [site.matrices(program.tensor(site.weight).detach())[0] for site in sites]
    inputs = metrics.norm(sites)
    energies = [output_error(w, None, inputs) for w in weights]
    scales = error_scales(sites, energies, metrics)
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
    matrix: torch.Tensor, inputs: torch.Tensor | Moment | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """Errors of the plain split in another norm, at every rank."""
    if rows is not None:
        found = split(matrix.double(), min(matrix.shape), randomised=False)
        # W - W~ = sum of u_j d_j' over the j left out, with orthogonal d_j.
        return _tails((rows @ found.up.square()) * found.down.square().sum(1))
    # For orthonormal U, what U_r U_r' W loses is tr(W A W') less the diagonal of U' W A W' U.
    left, wide = left_vectors(matrix), Wide(matrix)
    norm = Norm(inputs, 0.0, matrix.device)
    caught = [left.new_zeros(1)]
    for part in blocks(left.shape[1]):
        shown = wide.under(left[:, part])
        caught.append((norm.read(shown) * shown).sum(1))
    whole, sums = output_error(matrix, None, inputs), torch.cat(caught).cumsum(0)
    return (whole - sums).clamp_min(0)


def _convolution_plans(
    site: Site, form: Form, program: Program, metrics: Metrics
) -> Iterator[Plan]:
    if not fits(site, form):
        return
    ranks = _grid(most_rank([site], form), _CONV_GRID)
    if form == "cp":
        weight = program.tensor(site.weight)
        for rank, error in zip(ranks, cp_errors(weight, ranks), strict=True):
            found = plan_of([site], "svd", form, rank, error)
            if found is not None:
                yield found
        return
    for rank in ranks:
        found = plan_of([site], "svd", form, rank)
        if found is not None:
            yield replace(found, error=make(found, program, metrics, 0.0, 0).error)
