"""How much an error in each layer changes the outputs of the whole program, measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from torchlathe.ir import Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import info
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.factorising.making import make
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.plans import most_rank, plan_of
from torchlathe.passes.rewrite.factorising.sites import Site, bias_of
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["Effects", "output_weights", "outputs_of"]

Effects: TypeAlias = Callable[
    [Program, PassContext, Sequence[Site], Metrics, str, float], dict[Site, float]
]

# More batches hardly change how layers rank, and each costs one run for every layer.
_BATCHES = 2


def output_weights(
    program: Program,
    ctx: PassContext,
    sites: Sequence[Site],
    metrics: Metrics,
    method: str,
    damping: float,
) -> dict[Site, float]:
    """Relative squared change of the outputs over that of the layer, for each layer.

    Each layer alone is split to half of the largest rank that would save, and the program is run
    on a few batches. What cannot be split counts 1.

    Args:
        program: The program.
        ctx: The batches (or example inputs) and where progress goes.
        sites: The layers.
        metrics: The norms that the splits are best in.
        method: As `plan_of` takes it.
        damping: As `make` takes it.
    """
    batches = [flat for _, flat in itertools.islice(flat_batches(program, ctx), _BATCHES)]
    expected = [outputs_of(program, flat) for flat in batches]
    whole = sum(float(value.square().sum()) for values in expected for value in values)
    found = {}
    for number, site in enumerate(sites):
        ctx.report(f"effect of {site.weight} on the outputs ({number + 1}/{len(sites)})")
        plan = plan_of([site], method, "matrix", max(1, most_rank([site]) // 2))
        found[site] = 1.0
        if plan is None or not whole:
            continue
        factors = make(plan, program, metrics, damping, ctx.seed)
        if factors.error <= 0:
            continue
        changed = _replaced(program, site, factors.own[0], factors.shared[0], factors.shifts[0])
        gap = 0.0
        for flat, wanted in zip(batches, expected, strict=True):
            after = outputs_of(program, flat, changed)
            pairs = zip(after, wanted, strict=True)
            gap += sum(float((new - old).square().sum()) for new, old in pairs)
        found[site] = gap / whole / factors.error
    # A layer that seems not to matter at all is one that the few batches do not show.
    least = 1e-6 * max(found.values(), default=1.0)
    return {site: max(weight, least) for site, weight in found.items()}


def _replaced(
    program: Program,
    site: Site,
    up: torch.Tensor,
    down: torch.Tensor,
    shift: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Tensors under which the program as it is acts as if the site were split."""
    first = down.reshape(site.groups, -1, site.ins)
    last = up.reshape(site.groups, site.outs, -1)
    product = last @ first
    changed = {site.weight: site.weight_from(product)}
    if shift is not None:
        for call in site.calls:
            bias = bias_of(call)
            name = None if bias is None else info(bias).tensor
            if name is not None:
                old = program.tensor(name).detach()
                changed[name] = (old.double() + shift).to(old.dtype)
    return changed


def outputs_of(
    program: Program, flat: list[Any], changed: Mapping[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The floating outputs, in float64.

    Args:
        program: What is run.
        flat: Its inputs.
        changed: Tensors that take the place of its own.
    """

    def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if changed is None else changed.get(name, tensor)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = run_flat(program, flat, replace_tensor=read)
    return [x.double() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]
