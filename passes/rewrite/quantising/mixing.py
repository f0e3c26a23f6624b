"""Which scheme for which layer under one budget, by what each does to the outputs, measured.

Every layer is rounded alone by every scheme, and the program is run on a few batches: the relative
squared change of the outputs is what a choice costs in fidelity. Changes of several layers are
taken to add up. The choice is that of least sum within the budgets (bytes, seconds, or both), by
integer programming.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from torchlathe.ir import InputError, OptionError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.quantities import BYTES, quantity
from torchlathe.passes.rewrite.factorising.choosing import Option, choose_exact, thinned
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.quantising.grids import Clip, quantised
from torchlathe.passes.rewrite.quantising.reading import operands_of, run_reading
from torchlathe.passes.rewrite.quantising.schemes import Scheme
from torchlathe.passes.rewrite.quantising.timing import SchemeTimes
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
        amounts: What these layers take and what they may take, for the report.
    """

    plans: dict[Site, Scheme]
    dense: tuple[str, ...]
    expected: float
    amounts: dict[str, int | float | str]


@dataclass(frozen=True)
class _Limit:
    """One budget: what each layer costs as it is and by scheme, and what all may cost."""

    name: str
    dense: Mapping[Site, float]
    price: Callable[[Site, Scheme], float]
    allowed: float
    text: Callable[[float], str]

    def of(self, option: Option) -> float:
        """What an option costs."""
        (site,) = option.sites
        if option.plan is None:
            return self.dense[site]
        return self.price(site, cast("Scheme", option.plan))

    def least(self, choices: Mapping[Site, Sequence[Scheme]]) -> float:
        """What the cheapest choice costs."""
        return sum(
            min([self.dense[site], *(self.price(site, scheme) for scheme in schemes)])
            for site, schemes in choices.items()
        )


def mix(
    program: Program,
    ctx: PassContext,
    choices: Mapping[Site, Sequence[Scheme]],
    budgets: Mapping[str, float | str],
    clip: Clip,
    where: str,
) -> Mixture:
    """Choose a scheme, or none, for each layer.

    Args:
        program: The program; it is not changed.
        ctx: The batches (or example inputs), and where progress goes.
        choices: The schemes that each layer may get.
        budgets: Of the whole model, by name: ``"bytes"``, ``"latency"`` or both; a share of what it
            is, or an amount.
        clip: How ranges are chosen.
        where: Name of the pass, for messages.

    Raises:
        InputError: What a layer reads, or an output, is not finite.
        OptionError: A budget is below what the pass leaves alone, or below the least, or no choice
            is within both.
    """
    limits, amounts = [], dict[str, int | float | str]()
    times: SchemeTimes | None = None
    if "bytes" in budgets:
        limits.append(_of_bytes(program, choices, budgets["bytes"], where))
    if "latency" in budgets:
        times = SchemeTimes.of(program, list(choices), ctx.report)
        limits.append(_of_seconds(times, choices, budgets["latency"], where))
    chosen = _chosen(list(_options(program, ctx, choices, limits[0], clip)), limits, where)
    plans = {o.sites[0]: cast("Scheme", o.plan) for o in chosen if o.plan is not None}
    for limit in limits:
        spent = sum(map(limit.of, chosen))
        if times is None or limit.name != "latency":
            amounts |= {"bytes_of_layers": int(spent), "bytes_allowed": int(limit.allowed)}
        else:
            amounts |= {
                "expected_seconds": times.whole(spent),
                "seconds_allowed": times.whole(limit.allowed),
                "seconds_before": times.timed.whole,
            }
    return Mixture(
        {site: plans[site] for site in choices if site in plans},
        tuple(site.weight for site in choices if site not in plans),
        sum(option.loss for option in chosen),
        amounts,
    )


def _chosen(options: Sequence[Option], limits: Sequence[_Limit], where: str) -> list[Option]:
    """The options of least loss within one or two limits."""
    if len(limits) == 1:
        return choose_exact(thinned(options), limits[0].allowed)
    second = {option: limits[1].of(option) for option in options}
    found = choose_exact(options, limits[0].allowed, also=[(second, limits[1].allowed)])
    if not found:
        raise OptionError(
            f"no choice of schemes is within both {' and '.join(one.name for one in limits)}",
            where=where,
            hint="allow more of one, or other schemes",
        )
    return found


def _of_bytes(
    program: Program, choices: Mapping[Site, Sequence[Scheme]], asked: float | str, where: str
) -> _Limit:
    whole = float(program.cost().bytes)
    dense = {site: _dense_bytes(program, site) for site in choices}
    rest = whole - sum(dense.values())

    def price(site: Site, scheme: Scheme) -> float:
        layout = scheme.layout(site.ins, program.tensor(site.weight).dtype)
        return float(layout.nbytes(site.outs * site.groups))

    most = quantity(asked, BYTES, name="bytes", where=where).of(whole)
    limit = _Limit("bytes", dense, price, most - rest, lambda amount: f"{amount + rest:,.0f}")
    return _possible(limit, choices, where)


def _of_seconds(
    times: SchemeTimes, choices: Mapping[Site, Sequence[Scheme]], asked: float | str, where: str
) -> _Limit:
    def text(amount: float) -> str:
        return f"{times.whole(amount) * 1e3:.3g} ms"

    allowed = times.allowed(asked, where)
    return _possible(_Limit("latency", times.dense, times.seconds, allowed, text), choices, where)


def _possible(limit: _Limit, choices: Mapping[Site, Sequence[Scheme]], where: str) -> _Limit:
    least = limit.least(choices)
    if limit.allowed < least:
        raise OptionError(
            f"{limit.name} asks for {limit.text(limit.allowed)}, and {limit.text(least)} is the "
            "least that these layers and schemes allow",
            where=where,
            hint="allow schemes of fewer bits, or embeddings=true",
        )
    return limit


def _dense_bytes(program: Program, site: Site) -> float:
    tensor = program.tensor(site.weight)
    return float(tensor.numel() * tensor.element_size())


def _options(
    program: Program,
    ctx: PassContext,
    choices: Mapping[Site, Sequence[Scheme]],
    limit: _Limit,
    clip: Clip,
) -> Iterator[Option]:
    batches = [flat for _, flat in itertools.islice(flat_batches(program, ctx), _BATCHES)]
    read = operands_of(choices)
    wanted = [_floating(run_reading(program, flat, read)) for flat in batches]
    whole = sum(float(value.square().sum()) for values in wanted for value in values)
    if not math.isfinite(whole):
        raise InputError(
            "the outputs on the calibration data have values that are not finite",
            hint="look for NaN in the data, and for infinity in what the model returns",
        )
    for number, (site, schemes) in enumerate(choices.items()):
        ctx.report(f"effect of {site.weight} on the outputs ({number + 1}/{len(choices)})")
        yield Option((site,), None, limit.dense[site], 0.0)
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
            cost = limit.price(site, scheme)
            yield Option((site,), cast("Any", scheme), cost, gap / max(whole, 1e-300))


def _outputs(program: Program, flat: list[Any], name: str, changed: Tensor) -> list[Tensor]:
    """The floating outputs with one tensor replaced."""

    def read(tensor_name: str, tensor: Tensor) -> Tensor:
        return changed if tensor_name == name else tensor

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return _floating(run_flat(program, flat, replace_tensor=read))


def _floating(found: Sequence[Any]) -> list[Tensor]:
    """The floating outputs, in float64."""
    return [x.double() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]
