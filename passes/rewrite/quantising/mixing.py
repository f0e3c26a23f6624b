"""Which scheme for which layer under one budget, by what each does to the outputs, measured.

Every layer is rounded alone by every scheme, and the program is run on a few batches: the relative
squared change of the outputs is what a choice costs in fidelity. Changes of several layers are
taken to add up. The choice is that of least sum within the budget, by integer programming.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchlathe.ir import OptionError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.quantities import BYTES, quantity
from torchlathe.passes.rewrite.factorising.choosing import Option, choose_exact, cost_of, thinned
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.quantising.grids import Clip, quantised
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.writing import matrix_of
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["Mixture", "mix"]

# More batches hardly change how layers rank, and each costs a run for every layer and scheme.
_BATCHES = 2


@dataclass(frozen=True)
class Mixture:
    """What was chosen.

    Attributes:
        plans: A scheme for each layer that is quantised.
        dense: Names of those that are left as they are.
        expected: Relative squared change of the outputs, if changes add up.
        spent: Bytes of these layers.
        allowed: Bytes that they may take.
    """

    plans: dict[Site, Scheme]
    dense: tuple[str, ...]
    expected: float
    spent: float
    allowed: float


def mix(
    program: Program,
    ctx: PassContext,
    choices: Mapping[Site, Sequence[Scheme]],
    budget: float | str,
    clip: Clip,
    where: str,
) -> Mixture:
    """Choose a scheme, or none, for each layer.

    Args:
        program: The program; it is not changed.
        ctx: The batches (or example inputs), and where progress goes.
        choices: The schemes that each layer may get.
        budget: Bytes of the whole model, or a share of them.
        clip: How ranges are chosen.
        where: Name of the pass, for messages.

    Raises:
        OptionError: The budget is below what the pass leaves alone, or below the least.
    """
    whole = float(program.cost().bytes)
    dense = {site: _dense_bytes(program, site) for site in choices}
    asked = quantity(budget, BYTES, name="bytes", where=where).of(whole)
    allowed = asked - (whole - sum(dense.values()))
    least = sum(
        min([dense[site], *(s.bits_of(site.outs * site.groups, site.ins) / 8 for s in schemes)])
        for site, schemes in choices.items()
    )
    if allowed < least:
        raise OptionError(
            f"bytes asks for {asked:,.0f}, and {whole - sum(dense.values()) + least:,.0f} is the "
            "least that these layers and schemes allow",
            where=where,
            hint="allow schemes of fewer bits, or embeddings=true",
        )
    options = list(_options(program, ctx, choices, dense, clip))
    chosen = choose_exact(thinned(options), allowed)
    plans: dict[Site, Scheme] = {}
    for option in chosen:
        if option.plan is not None:
            plans[option.sites[0]] = cast("Scheme", option.plan)
    order = list(choices)
    return Mixture(
        {site: plans[site] for site in order if site in plans},
        tuple(site.weight for site in order if site not in plans),
        sum(option.loss for option in chosen),
        cost_of(chosen),
        allowed,
    )


def _dense_bytes(program: Program, site: Site) -> float:
    tensor = program.tensor(site.weight)
    return float(tensor.numel() * tensor.element_size())


def _options(
    program: Program,
    ctx: PassContext,
    choices: Mapping[Site, Sequence[Scheme]],
    dense: Mapping[Site, float],
    clip: Clip,
) -> Iterator[Option]:
    batches = [flat for _, flat in itertools.islice(flat_batches(program, ctx), _BATCHES)]
    wanted = [_outputs(program, flat, "", None) for flat in batches]
    whole = sum(float(value.square().sum()) for values in wanted for value in values)
    for number, (site, schemes) in enumerate(choices.items()):
        ctx.report(f"effect of {site.weight} on the outputs ({number + 1}/{len(choices)})")
        yield Option((site,), None, dense[site], 0.0)
        weight = program.tensor(site.weight).detach()
        matrix = matrix_of(site, weight)
        for scheme in schemes:
            stored = quantised(
                matrix,
                scheme.weights,
                group=scheme.group,
                symmetric=scheme.symmetric,
                clip=clip,
            )
            rounded = stored.dequantised(torch.float32).reshape(site.groups, site.outs, site.ins)
            changed = site.weight_from(rounded).to(weight.dtype)
            gap = 0.0
            for flat, values in zip(batches, wanted, strict=True):
                found = _outputs(program, flat, site.weight, changed)
                pairs = zip(found, values, strict=True)
                gap += sum(float((new - old).square().sum()) for new, old in pairs)
            # The plan of an option may be of any kind: choosing only looks at cost and loss.
            yield Option(
                (site,), cast("Any", scheme), float(stored.nbytes), gap / max(whole, 1e-300)
            )


def _outputs(program: Program, flat: list[Any], name: str, changed: Tensor | None) -> list[Tensor]:
    """The floating outputs, in float64, with one tensor replaced."""

    def read(tensor_name: str, tensor: Tensor) -> Tensor:
        return changed if changed is not None and tensor_name == name else tensor

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = run_flat(program, flat, replace_tensor=read)
    return [x.double() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]
