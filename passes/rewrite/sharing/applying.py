"""Writes a colouring into a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torchlathe.ir import Edit, Program
from torchlathe.passes.analysis.sharing.bases import fit_basis
from torchlathe.passes.analysis.sharing.candidates import Candidate, find_candidates
from torchlathe.passes.analysis.sharing.coloring import Coloring
from torchlathe.passes.analysis.sharing.costs import WeighedLayer, corrected
from torchlathe.passes.analysis.sharing.curvature import merged_mean
from torchlathe.passes.rewrite.sharing.writing import (
    add_correction,
    add_parameter,
    basis_shape,
    coefficient_shape,
    replace_by_product,
    tie_biases,
    tie_weights,
)

__all__ = ["apply_coloring"]


def apply_coloring(
    program: Program,
    coloring: Coloring,
    *,
    by: str = "",
    rounds: int = 3,
    biases: bool = False,
    report: Callable[[str], object] | None = None,
) -> None:
    """Let the layers of each class share what the colouring says.

    Args:
        program: The one that the colouring is of; changed in one edit.
        coloring: Classes, and the weights and curvature of their layers.
        by: Text form of the pass, kept as provenance.
        rounds: How often a shared basis and its coefficients are refitted.
        biases: Whether layers with one weight get one bias too.
        report: Called with a line of text about what is being done.
    """
    sharing = [one for one in coloring if len(one.layers) > 1 or one.rank]
    with program.edit(by=by) as edit:
        if any(len(one.layers) > 1 for one in sharing):
            for name, tensor in coloring.gauge.tensors.items():
                edit.set_tensor(name, tensor)
        layers = {layer.name: layer for layer in find_candidates(program)}
        for number, one in enumerate(sharing):
            if report is not None:
                report(f"sharing: class {number + 1} of {len(sharing)}")
            members = [layers[name] for name in one.layers]
            weighed = [coloring.weighed[name] for name in one.layers]
            if coloring.mode == "basis":
                _share_basis(edit, one.rank, rounds, members, weighed)
            elif coloring.mode == "base":
                _share_base(edit, one.rank, members, weighed)
            else:
                forms = [layer.curvature for layer in weighed]
                common = merged_mean(forms, [layer.weight for layer in weighed])
                tie_weights(edit, members, common)
                if biases and len({layer.bias for layer in members} - {None}) == len(members):
                    tie_biases(edit, members, _common_bias(edit, members, weighed, common))


def _common_bias(
    edit: Edit,
    members: Sequence[Candidate],
    weighed: Sequence[WeighedLayer],
    common: torch.Tensor,
) -> torch.Tensor:
    """The bias that keeps the mean results best, now that the weights are one.

    With the mean m of a layer's inputs, its results move by ``(W_c - W) m + b_c - b`` on average;
    the least sum of squares, each result weighed by its curvature, is at the weighed mean of
    ``b - (W_c - W) m``.
    """
    wanted, weights = [], []
    for layer, known in zip(members, weighed, strict=True):
        assert layer.bias is not None
        bias = edit.program.tensor(layer.bias).detach().double()
        shift = 0.0 if known.mean is None else (common - known.weight) @ known.mean
        wanted.append(bias - shift)
        weights.append(torch.ones_like(bias) if known.outputs is None else known.outputs)
    shares = torch.stack(weights).clamp_min(0)
    # Where no layer has any curvature, the plain mean.
    shares = torch.where(shares.sum(0) > 0, shares, torch.ones_like(shares))
    return (torch.stack(wanted) * shares).sum(0) / shares.sum(0)


def _share_basis(
    edit: Edit,
    rank: int,
    rounds: int,
    members: Sequence[Candidate],
    weighed: Sequence[WeighedLayer],
) -> None:
    fit = fit_basis([layer.basis for layer in weighed if layer.basis is not None], rank, rounds)
    rank = len(fit.basis)
    shape = basis_shape(members[0], rank)
    basis = add_parameter(edit, members[0].name, "basis", fit.basis.reshape(shape))
    for layer, found in zip(members, fit.coefficients, strict=True):
        own = found.reshape(coefficient_shape(layer, rank))
        added = add_parameter(edit, layer.name, "coefficients", own)
        replace_by_product(edit, layer, basis, added)


def _share_base(
    edit: Edit, rank: int, members: Sequence[Candidate], weighed: Sequence[WeighedLayer]
) -> None:
    common, factors = corrected(weighed, rank)
    tie_weights(edit, members, common)
    for layer, (left, right) in zip(members, factors, strict=True):
        found = len(right)
        inner = right.reshape(basis_shape(layer, found))
        outer = left.reshape(coefficient_shape(layer, found))
        first = add_parameter(edit, layer.name, "correction_in", inner)
        second = add_parameter(edit, layer.name, "correction_out", outer)
        add_correction(edit, layer, first, second)
