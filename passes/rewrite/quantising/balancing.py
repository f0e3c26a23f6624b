"""Scales that move between activations and weights before either is rounded: AWQ, SmoothQuant.

Both divide the channels of a value and multiply the columns that read it, which changes nothing
before rounding. They differ in the scales they try: AWQ by how large a channel of the activations
is (arXiv 2306.00978, section 3.2), SmoothQuant by that and by how large the columns are (arXiv
2211.10438, equation 4). The exponent is searched for each value here, as AWQ does, with weights
and activations rounded as the scheme says; leaving the value as it is is always among the choices.
Scales are powers of two, so that dividing and multiplying are exact in floating point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from torchlathe.ir import Program, VerifyError
from torchlathe.ir.verifying import check_equivalence
from torchlathe.kernels.dequantize.formats import format_of
from torchlathe.kernels.dequantize.op import rounded_tokens
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.quantising.folds import Fold, apply, find_folds
from torchlathe.passes.rewrite.quantising.grids import Clip, quantised
from torchlathe.passes.rewrite.quantising.reading import operands_of, run_reading
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.writing import matrix_of
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["Balance", "balance"]

Balance = Literal["none", "smoothquant", "awq"]

_EXPONENTS = tuple(step / 10 for step in range(1, 11))
_ROWS = 512  # rows of each value that choices are compared on


@dataclass
class _Seen:
    """What is known of a value: sizes of its channels, and some of its rows."""

    largest: Tensor
    total: Tensor
    count: int
    rows: list[Tensor]

    def add(self, value: Tensor, few: int) -> None:
        """Add the rows of one batch, and keep a few."""
        rows = value.detach().reshape(-1, value.shape[-1]).to(torch.float32)
        size = rows.abs()
        self.largest = torch.maximum(self.largest, size.amax(0))
        self.total += size.sum(0)
        self.count += len(rows)
        chosen = torch.randperm(len(rows))[:few]
        self.rows.append(rows[chosen])


def balance(
    program: Program,
    ctx: PassContext,
    plans: Mapping[Site, Scheme],
    method: Balance,
    clip: Clip,
    *,
    insert: bool = False,
) -> dict[str, int | float | str]:
    """Move scales where that makes the outputs of rounded layers better.

    Args:
        program: Changed in one edit, and held to compute what it did.
        ctx: The batches (or example inputs), and where progress goes.
        plans: The layers that are going to be rounded, and how.
        method: Which scales are tried.
        clip: How ranges will be chosen.
        insert: Whether values that no neighbour can scale are multiplied on the spot.

    Returns:
        Numbers for the report.

    Raises:
        InputError: What a layer reads is not finite.
        VerifyError: The program computes something else now.
    """
    folds = find_folds(program, plans, insert=insert)
    seen = _observe(program, ctx, folds, plans)
    chosen: list[tuple[Fold, Tensor]] = []
    gains = []
    for number, fold in enumerate(folds):
        ctx.report(f"{method} of {fold.sites[0].weight} ({number + 1}/{len(folds)})")
        scales, gain = _search(program, fold, seen[fold.value], plans, method, clip)
        gains.append(gain)
        if scales is not None:
            chosen.append((fold, scales))
    read = {site for fold in folds for site in fold.sites}
    if left := [s.weight for s in plans if s not in read and s.kind == "linear"]:
        text = f"nothing can take the scales of what {len(left)} layers read, {left[0]} among them"
        ctx.tell(Diagnostic("note", text, name=left[0]))
    if chosen:
        before = program.copy()
        with program.edit(by=ctx.spec) as edit:
            apply(edit, chosen, ctx.report)
        check = check_equivalence(before, program)
        if not check.passed:
            raise VerifyError(f"moving scales is exact, but {check.detail}")
    return {
        "balanced": len(chosen),
        "balanced_in_place": sum(not fold.writers for fold, _ in chosen),
        "balance_error_ratio": sum(gains) / len(gains) if gains else 1.0,
    }


def _observe(
    program: Program, ctx: PassContext, folds: Sequence[Fold], sites: Iterable[Site]
) -> dict[fx.Node, _Seen]:
    seen = {
        fold.value: _Seen(torch.zeros(fold.channels), torch.zeros(fold.channels), 0, [])
        for fold in folds
    }
    batches = list(flat_batches(program, ctx))
    few = max(1, _ROWS // len(batches))

    def see(node: fx.Node, value: Tensor) -> None:
        if node in seen:
            seen[node].add(value.cpu(), few)

    read = operands_of(sites)
    for _, flat in batches:
        run_reading(program, flat, read, see)
    return seen


def _search(
    program: Program,
    fold: Fold,
    seen: _Seen,
    plans: Mapping[Site, Scheme],
    method: Balance,
    clip: Clip,
) -> tuple[Tensor | None, float]:
    """The best scales, None for leaving it; and the error with them over that without."""
    rows = torch.cat(seen.rows)
    weights = [matrix_of(s, program.tensor(s.weight).detach()).float() for s in fold.sites]
    wanted = [rows @ weight.T for weight in weights]
    columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    mean = seen.total / max(seen.count, 1)

    def loss(scales: Tensor) -> float:
        lost = 0.0
        for site, weight, target in zip(fold.sites, weights, wanted, strict=True):
            scheme = plans[site]
            x = rows / scales
            if scheme.activations is not None:
                numbers, each = rounded_tokens(x, (-1,), format_of(scheme.activations))
                x = numbers * each
            stored = quantised(
                weight * scales,
                scheme.weights,
                group=scheme.group,
                symmetric=scheme.symmetric,
                # A search in a search would take minutes, and ranks the scales hardly otherwise.
                clip="none" if clip == "mse" and scheme.format.bits == 8 else clip,
            )
            found = x @ stored.dequantised().T
            lost += float((found - target).square().sum() / target.square().sum().clamp_min(1e-30))
        return lost

    plain = best = loss(torch.ones(fold.channels))
    chosen = None
    for exponent in _EXPONENTS:
        if method == "awq":
            scales = mean.clamp_min(1e-8) ** exponent
        else:
            scales = seen.largest.clamp_min(1e-5) ** exponent
            scales = scales / columns.clamp_min(1e-5) ** (1 - exponent)
        scales = scales / (scales.amax() * scales.amin()).sqrt()
        scales = torch.exp2(scales.clamp(2.0**-12, 2.0**12).log2().round())
        scales[seen.largest == 0] = 1.0
        if (value := loss(scales)) < best:
            best, chosen = value, scales
    return chosen, best / plain if plain > 0 else 1.0
