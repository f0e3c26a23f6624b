"""Low rank plus quantised residual: ``W = U V + Q``, with ``Q`` in few bits.

``Q`` stores ``W - U V``, and ``U V`` catches what the rounding lost as well as a product of its
rank can in the norm of the data. Each is made for the other in turn, and the best pair is taken.
Where there is data, ``Q`` is swept (GPTQ) from the second time on.

Source: L2QER (arXiv 2402.02446) for the product of the rounding's error in the norm of the data,
there by a diagonal and here by the whole second moment; LQ-LoRA (arXiv 2311.12023, algorithm 1) for
making them in turn, there with rounding to nearest. Reconstructions; sweeping in turn is own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlathe.ir import Edit, Program
from torchlathe.passes.base import Diagnostic, PassContext, PassResult
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.products import Moment
from torchlathe.passes.rewrite.factorising.sites import Site, bias_of
from torchlathe.passes.rewrite.factorising.splits import Split, output_error, split
from torchlathe.passes.rewrite.factorising.telling import left_alone
from torchlathe.passes.rewrite.factorising.writing import add_factor, shifted_bias, stem_of
from torchlathe.passes.rewrite.quantising.grids import Quantised, quantised
from torchlathe.passes.rewrite.quantising.rounding import grids_of, swept
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.writing import write
from torchlathe.passes.rewrite.sweeping.sweep import damping_of, naming, order_by_activity

__all__ = ["Residual", "residual_split", "split_with_residuals"]

aten = torch.ops.aten
_ROUNDS = 4
# What a sweep damps at least; a product is steadier, and damps less.
_LEAST = 0.01


@dataclass(frozen=True)
class Residual:
    """A matrix as a product of two and a matrix of few bits.

    Attributes:
        stored: What the product does not stand for.
        low: The product.
        error: Squared error over squared norm, in the norm of the data.
        alone: That of the stored matrix without the product, made of the whole matrix.
    """

    stored: Quantised
    low: Split
    error: float
    alone: float

    @property
    def product(self) -> torch.Tensor:
        """The matrix that both together stand for, (outs, ins)."""
        return self.stored.dequantised(self.low.up.dtype) + self.low.product

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        factors = (self.low.up, self.low.down)
        return self.stored.nbytes + sum(f.numel() * f.element_size() for f in factors)


def residual_split(
    weight: torch.Tensor,
    rank: int,
    scheme: Scheme,
    *,
    inputs: torch.Tensor | None = None,
    count: float | None = None,
    damping: float = 0.0,
    sweeps: bool = True,
    seed: int = 0,
) -> Residual:
    """A product of this rank and a matrix of few bits, each made for the other.

    Args:
        weight: Shape (outs, ins), floating.
        rank: Of the product, at least 1.
        scheme: How the matrix of few bits is stored; activations are left alone.
        inputs: As `splits.split` takes it.
        count: How many rows of data the inputs are the mean of; by default enough of them.
        damping: As there; where rows are few, what they do not tell of is damped by more.
        sweeps: Whether rounding errors of columns are made up for by others (GPTQ), where there
            are inputs.
        seed: As there.
    """
    wide = weight.detach().float()
    whole = output_error(wide, torch.zeros_like(wide), inputs)
    importance = None if inputs is None else inputs.diagonal().float()
    moment = inputs.to(wide.device, torch.float32) if sweeps and inputs is not None else None
    swept_by = 0.0
    if moment is not None:
        swept_by = _LEAST if count is None else damping_of(moment, int(count), _LEAST)
        damping = max(damping, swept_by)
    best: tuple[Quantised, Split] | None = None
    alone, rest = 0.0, wide
    for number in range(_ROUNDS):
        if number and moment is not None:
            stored = _swept(rest, scheme, moment, swept_by)
        else:
            stored = quantised(
                rest,
                scheme.weights,
                group=scheme.group,
                symmetric=scheme.symmetric,
                clip="mse",
                importance=importance,
            )
        gap = wide - stored.dequantised()
        if not number:
            alone = output_error(gap, torch.zeros_like(gap), inputs)
        low = split(gap, rank, inputs=inputs, damping=damping, seed=seed)
        if best is not None and low.error >= best[1].error:
            break
        best = stored, low
        rest = wide - low.product
    assert best is not None
    stored, low = best
    up, down = low.up.to(weight.dtype), low.down.to(weight.dtype)
    found = Split(up, down, low.error, low.energy)
    left = output_error(wide, stored.dequantised() + found.product, inputs)
    return Residual(stored, found, _share(left, whole), _share(alone, whole))


def _swept(matrix: torch.Tensor, scheme: Scheme, moment: torch.Tensor, damping: float) -> Quantised:
    """A matrix in few bits, column by column, those to come making up for those that are done."""
    level = moment.diagonal()
    grids = grids_of(matrix, scheme, ("mse", "none"), level + damping * level.mean(), None)
    order = order_by_activity(moment)
    found, _ = swept(grids, matrix.to(grids[0].scales.dtype), moment, damping=damping, order=order)
    return found.grid.quantised(found.codes)


def split_with_residuals(
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    left: dict[str, str],
    metrics: Metrics,
    *,
    rank: int,
    scheme: Scheme,
    damping: float,
    sweeps: bool,
) -> PassResult:
    """Split every linear layer of a program so, where that takes fewer bytes.

    Args:
        program: What is split.
        ctx: Where progress goes.
        sites: Its layers.
        left: Why layers are left alone; takes more of them.
        metrics: The norms that the splits are best in.
        rank: Of each product.
        scheme: Of each matrix.
        damping: As `residual_split` takes it.
        sweeps: Likewise.
    """
    chosen = [site for site in sites if site.kind == "linear"]
    left |= {s.weight: "it is no linear layer" for s in sites if s.kind != "linear"}
    done: list[tuple[Site, Residual, int]] = []
    with program.edit(by=ctx.spec) as edit:
        for number, site in enumerate(chosen):
            ctx.report(f"splitting {site.weight} ({number + 1}/{len(chosen)})")
            weight = program.tensor(site.weight).detach()
            matrices, norm = site.matrices(weight), metrics.norm([site])
            with naming(site.weight):
                found = residual_split(
                    matrices[0],
                    rank,
                    scheme,
                    inputs=norm.dense() if isinstance(norm, Moment) else norm,
                    count=norm.count if isinstance(norm, Moment) else None,
                    damping=damping,
                    sweeps=sweeps,
                    seed=ctx.seed,
                )
            before = weight.numel() * weight.element_size()
            if found.nbytes >= before:
                left[site.weight] = "it would not be smaller"
                continue
            shift = metrics.shift([site], 0, matrices, [(found.product,)])
            _write(edit, site, found, shift)
            done.append((site, found, before))
    return PassResult(bool(done), _statistics(done), [*_told(done, scheme), *left_alone(left)])


def _write(edit: Edit, site: Site, found: Residual, shift: torch.Tensor | None) -> None:
    """Let every call read the stored matrix, and add the product of the same input."""
    trains = edit.program.tensor(site.weight).requires_grad
    stem = stem_of(site.weight)
    down = add_factor(edit, f"{stem}down", found.low.down.contiguous(), trains)
    up = add_factor(edit, f"{stem}up", found.low.up.contiguous(), trains)
    lows = []
    for call in site.calls:
        bias = bias_of(call)
        if shift is not None and bias is not None:
            moved = shifted_bias(edit, call, bias, shift)
            if moved is not bias:
                edit.replace(bias, moved, [call])
        data: Any = site.operand(call)
        for factor in (down, up):
            data = edit.call(aten.linear.default, (data, factor), like=call, before=call)
        lows.append(data)
    written = write(edit, site, found.stored, None, {})
    for call, low in zip(written.calls, lows, strict=True):
        users = list(call.users)
        edit.replace(call, edit.call(aten.add.Tensor, (call, low), like=call), users)


def _statistics(done: Sequence[tuple[Site, Residual, int]]) -> dict[str, int | float | str]:
    found: dict[str, int | float | str] = {
        "split": len(done),
        "bytes_of_layers": sum(before for _, _, before in done),
        "kept_bytes": sum(residual.nbytes for _, residual, _ in done),
    }
    if done:
        found["mean_error"] = sum(r.error for _, r, _ in done) / len(done)
        found["mean_error_without_product"] = sum(r.alone for _, r, _ in done) / len(done)
    return found


def _told(done: Sequence[tuple[Site, Residual, int]], scheme: Scheme) -> Iterator[Diagnostic]:
    for site, found, before in done:
        yield Diagnostic(
            "note",
            f"rank {found.low.rank} and {scheme.weights}: {found.nbytes / before:.0%} of its "
            f"bytes, relative squared error {found.error:.2g}, and {found.alone:.2g} without the "
            "product",
            name=site.weight,
        )


def _share(part: float, whole: float) -> float:
    return max(part, 0.0) / whole if whole > 0 else 0.0
