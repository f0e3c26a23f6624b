"""Symmetries of layers: which hidden unit of one layer stands for which of another, and its scale.

Two layers can compute the same function with other weights: hidden units may come in any order,
and behind a ReLU each may be larger by a factor that its reader takes back. What is compared or
merged has to be brought to one such *gauge* first. Pure functions of tensors; nothing here knows
about programs.

Source: weight matching of Git Re-Basin (arXiv 2209.04836, section 3.2) for one layer, where it is
an assignment problem with an exact solution; the balance of scales is that of Path-SGD
(arXiv 1506.02617). Reconstructions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchlathe.ir import InputError

__all__ = ["balanced_scales", "match_units", "merging_costs", "unit_agreement"]

Tensors = Sequence[torch.Tensor]


def unit_agreement(
    reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Inner products of each unit of one list with each of another, summed over the tensors.

    Args:
        reference: Tensors with the units on axis 0; all else is what a unit owns.
        other: As many tensors, of the same shapes.

    Returns:
        Shape (units of the reference, units of the other) float64.

    Raises:
        InputError: The lists are empty, or shapes differ.
    """
    _check(reference, other)
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs in zip(reference, other, strict=True):
        a = mine.detach().double().reshape(mine.shape[0], -1)
        b = theirs.detach().double().reshape(theirs.shape[0], -1)
        total = total.to(a.device) + a @ b.to(a.device).T
    return total


def merging_costs(
    reference: Tensors, other: Tensors, curvatures: tuple[Tensors, Tensors]
) -> torch.Tensor:
    """What it costs to give each unit of one list and each of another the same parameters.

    With a curvature per element, h, giving two elements their best common value costs
    ``h h' / (h + h') (w - w')^2 / 2``. The curvature of a tensor is taken to be that of its unit
    times that of its place in the unit (``u_i o_e``, from the means of h), so that all pairs of
    units come from one matrix product: half of ``u u' / (u + u') sum_e o_e (w_e - w'_e)^2``.

    Args:
        reference: Tensors with the units on axis 0.
        other: As many tensors, of the same shapes.
        curvatures: Of both, not negative, in these shapes.

    Returns:
        Shape (units of the reference, units of the other) float64.

    Raises:
        InputError: The lists are empty, or shapes differ.

    Source: own; exact where the curvature is such a product, as the diagonal of ``G (x) A`` is.
    """
    _check(reference, other)
    for lists in curvatures:
        _check(reference, lists)
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs, ours, their_own in zip(reference, other, *curvatures, strict=True):
        a, b, h, k = (
            t.detach().double().reshape(t.shape[0], -1) for t in (mine, theirs, ours, their_own)
        )
        b, k = b.to(a.device), k.to(a.device)
        places = (h.mean(0) + k.mean(0)) / 2
        scale = float(places.sum())
        if not scale:
            total = total + a.new_zeros(len(a), len(b))
            continue
        u, v = h.sum(1)[:, None] / scale, k.sum(1)[None, :] / scale
        both = u * v / (u + v).clamp_min(torch.finfo(torch.float64).tiny)
        squares = (a.square() @ places)[:, None] + (b.square() @ places)[None, :]
        apart = (squares - 2 * (a * places) @ b.T).clamp_min(0)
        total = total.to(a.device) + both * apart / 2
    return total


def match_units(
    reference: Tensors, other: Tensors, curvatures: tuple[Tensors, Tensors] | None = None
) -> torch.Tensor:
    """The order of one layer's units in which they agree best with another layer's.

    Exact: among all permutations p the one with the largest sum of inner products of
    ``reference[i]`` and ``other[i][p]``, which is also the one with the least squared distance; or
    the one with the least sum of `merging_costs`.

    Args:
        reference: Tensors with the units on axis 0: rows of what writes the units, columns
            (transposed) of what reads them, biases.
        other: The same of the other layer, in the same order and of the same shapes.
        curvatures: Of both, if distances are to be weighed.

    Returns:
        p, shape (units,) int64 on the CPU, such that ``other[i][p]`` matches ``reference[i]``.

    Raises:
        InputError: The lists are empty, shapes differ, or a value is not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if curvatures is None:
        gains = unit_agreement(reference, other)
    else:
        gains = -merging_costs(reference, other, curvatures)
    if not bool(gains.isfinite().all()):
        raise InputError(
            "units cannot be matched: their inner products are not finite",
            hint="look for NaN or infinite weights",
        )
    _, columns = linear_sum_assignment(gains.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def balanced_scales(
    writers: Sequence[torch.Tensor], readers: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Per unit of a ReLU layer, the factor that makes its writers and readers equally long.

    ``relu(s x) = s relu(x)`` for s > 0, so writers times s and readers divided by s compute the
    same. With ``s = sqrt(|readers| / |writers|)`` both norms are their geometric mean, and no
    freedom of scale is left.

    Args:
        writers: Tensors with the units on axis 0 that write the units: rows and bias.
        readers: Tensors with the units on axis 0 that read them: transposed columns.

    Returns:
        Shape (units,) float64; 1 where either side is zero.

    Raises:
        InputError: A list is empty, or numbers of units differ.
    """
    if not writers or not readers:
        raise InputError("a scale needs what writes the units and what reads them")
    units = {tensor.shape[0] for tensor in (*writers, *readers)}
    if len(units) != 1:
        raise InputError(f"writers and readers differ in their number of units: {sorted(units)}")
    written, read = _norms(writers), _norms(readers)
    alive = (written > 0) & (read > 0)
    scales = (read / written.where(alive, torch.ones_like(written))).sqrt()
    return scales.where(alive, torch.ones_like(scales))


def _norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    squares = [t.detach().double().reshape(t.shape[0], -1).square().sum(1) for t in tensors]
    return torch.stack(squares).sum(0).sqrt()


def _check(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> None:
    if not reference or len(reference) != len(other):
        raise InputError(
            f"units are matched by equally many tensors of both, got {len(reference)} and "
            f"{len(other)}"
        )
    units = {tensor.shape[0] if tensor.dim() else 0 for tensor in reference}
    for index, (mine, theirs) in enumerate(zip(reference, other, strict=True)):
        if mine.shape != theirs.shape or not mine.dim():
            raise InputError(
                f"tensor {index} has the shapes {tuple(mine.shape)} and {tuple(theirs.shape)}",
                hint="the units of both have to own tensors of the same shapes",
            )
    if len(units) != 1:
        raise InputError(f"the tensors differ in their number of units: {sorted(units)}")
