"""Puts the cores of a network into the graph in the place of the matrix that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from torchlathe.ir import Edit, Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.cost.calls import value_of
from torchlathe.ir.cost.timing import Clock, Timer, median, samples
from torchlathe.ir.extents import as_int, example_sizes
from torchlathe.passes.rewrite.factorising.sites import Site, bias_of
from torchlathe.passes.rewrite.factorising.writing import add_factor, shifted_bias, stem_of
from torchlathe.passes.rewrite.tensor_networks.contracting import (
    Contraction,
    Step,
    contraction,
    run_contraction,
    train_terms,
)
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkPlan

__all__ = [
    "LayerClock",
    "Lowered",
    "Lowering",
    "can_write",
    "least_flops",
    "orders",
    "rows_of",
    "stored_cores",
    "write_network",
]

aten = torch.ops.aten

Lowering = Literal["auto", "contract", "materialise"]

# Letters for the axes of the input that are not contracted.
_LEAD, _TAIL = "ghijkl", "wxyz"
_ROUNDS, _CAP = 7, 0.05


@dataclass(frozen=True)
class Lowered:
    """How one call was written.

    Attributes:
        call: The last of the calls that stand for it.
        builds: Whether the matrix is built from the cores in each run.
        rows: Of the input, at the sizes that were decided for.
        flops: Of all steps for so many rows.
        seconds: By the cost model, (contracting, building the matrix).
        measured: The same by the clock, and that of the dense layer; None where it was not asked.
    """

    call: fx.Node
    builds: bool
    rows: int
    flops: int
    seconds: tuple[float, float]
    measured: tuple[float, float, float] | None = None


def can_write(site: Site) -> str | None:
    """Why a site cannot be a network; None if it can."""
    if site.kind == "convolution":
        if site.groups > 1:
            return "it is a grouped convolution"
        if any(extent != 1 for extent in site.kernel):
            return "its kernel is larger than 1"
        return None
    if site.kind == "linear":
        return None
    return f"it is {'an embedding' if site.kind == 'embedding' else 'a mixture of experts'}"


def stored_cores(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cores as they are kept: without the bonds of extent 1 at the ends."""
    found = list(cores)
    found[0] = found[0].squeeze(0)
    found[-1] = found[-1].squeeze(-1)
    return [core.contiguous() for core in found]


def rows_of(program: Program, site: Site, call: fx.Node) -> int:
    """Rows that a call multiplies with the matrix, at the sizes of the example inputs."""
    sizes = example_sizes(program)
    shape = value_of(site.operand(call).meta["val"]).shape
    axis = _axis(site, call)
    extents = [as_int(e, sizes) if hasattr(e, "free_symbols") else int(e) for e in shape]
    if site.kind == "convolution":
        extents = [-(-e // s) for e, s in zip(extents, _steps(call, len(extents)), strict=True)]
    return prod(extent for place, extent in enumerate(extents) if place != axis)


def write_network(
    edit: Edit,
    site: Site,
    plan: NetworkPlan,
    cores: Sequence[torch.Tensor],
    shift: torch.Tensor | None = None,
    *,
    lowering: Lowering = "auto",
    rows: int | None = None,
    clock: LayerClock | None = None,
    by_flops: bool = False,
) -> list[Lowered]:
    """Let every call of a site use the cores; the old parameter dies.

    New parameters are called after the module of the old one: ``encoder.query.weight`` becomes
    ``encoder.query.core1.weight`` and so on, of shapes (left bond, o_k, i_k, right bond) without
    the bonds at the ends. Tied weights stay tied: all calls read the same cores.

    Args:
        edit: Of the program.
        site: Linear, or a convolution with a kernel of 1.
        plan: What the cores are of.
        cores: As `network_cores` gives them.
        shift: Added to the bias, (outs,); for sites all of whose calls have one.
        lowering: Contract the cores with the input, build the matrix in each run, or what the
            cost model finds faster for each call.
        rows: Of the input, to decide by; None for those of the example inputs.
        clock: Takes the time of both ways, and decides where both are open.
        by_flops: Whether fewer FLOPs decide instead.

    Returns:
        For each call how it was written.
    """
    program = edit.program
    trains = program.tensor(site.weight).requires_grad
    stem = stem_of(site.weight)
    kept = stored_cores(cores)
    nodes = [
        add_factor(edit, f"{stem}core{number + 1}", core, trains)
        for number, core in enumerate(kept)
    ]
    done: list[Lowered] = []
    for call in site.calls:
        bias = bias_of(call)
        if shift is not None and bias is not None:
            bias = shifted_bias(edit, call, bias, shift)
        count = rows if rows is not None else rows_of(program, site, call)
        found = _chosen(plan, kept, count, _only(site, call, lowering), clock, by_flops)
        writer = _Writer(edit, site, call, bias, nodes, plan)
        new = writer.built(found.order) if found.builds else writer.contracted(found.order)
        # A layer that reads this one may be written in the same edit.
        new.meta.setdefault("val", call.meta["val"])
        edit.replace(call, new)
        done.append(
            Lowered(new, found.builds, count, found.order.flops, found.seconds, found.measured)
        )
    return done


# -- contract or materialise ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    order: Contraction
    builds: bool
    seconds: tuple[float, float]
    measured: tuple[float, float, float] | None


def _only(site: Site, call: fx.Node, lowering: Lowering) -> Lowering:
    """What is open for a call: one that pads or strides reads its input in its own way."""
    if site.kind == "convolution":
        steps = _steps(call, 9)
        padding = argument(call, "padding", 0)
        pads = padding != "valid" if isinstance(padding, str) else any(_list(padding))
        if pads or any(step != 1 for step in steps):
            return "materialise"
    return lowering


def least_flops(plan: NetworkPlan, rows: int) -> int:
    """FLOPs for so many rows, contracted or with the matrix built, whichever is less."""
    return min(order.flops for order in orders(plan, rows))


def orders(plan: NetworkPlan, rows: int) -> tuple[Contraction, Contraction]:
    """The best orders that do not build the matrix, and that do."""
    terms, extents, output = train_terms(plan.out_modes, plan.in_modes, plan.bonds, max(rows, 1))
    contracted = contraction(terms, extents, output, whole=False)
    return contracted, contraction(terms, extents, output, apart=0)


def _chosen(
    plan: NetworkPlan,
    cores: Sequence[torch.Tensor],
    rows: int,
    lowering: Lowering,
    clock: LayerClock | None,
    by_flops: bool,
) -> _Choice:
    both = orders(plan, rows)
    seconds = both[0].seconds, both[1].seconds
    measured = None if clock is None else clock.seconds(plan, cores[0], rows, both)
    told: tuple[float, ...] = seconds if measured is None else measured
    if by_flops:
        told = both[0].flops, both[1].flops
    builds = lowering == "materialise" or (lowering == "auto" and told[1] < told[0])
    return _Choice(both[builds], builds, seconds, measured)


class LayerClock:
    """Takes the time of ways to apply a network; layers of one shape share it.

    Args:
        timer: By default the wall clock of the device of the first cores.
    """

    def __init__(self, timer: Timer | None = None) -> None:
        self._timer = timer
        self._known: dict[tuple[Any, ...], tuple[float, float, float]] = {}

    def seconds(
        self, plan: NetworkPlan, like: torch.Tensor, rows: int, orders: Sequence[Contraction]
    ) -> tuple[float, float, float]:
        """Seconds of two orders, and of one product with the dense matrix, in turn.

        Args:
            plan: What is applied.
            like: Where the tensors are, and of which dtype.
            rows: Of the input.
            orders: Two, over the input and the cores.
        """
        key = (plan.out_modes, plan.in_modes, plan.bonds, rows, like.dtype, like.device)
        if key not in self._known:
            self._known[key] = self._measured(plan, like, rows, orders)
        return self._known[key]

    def _measured(
        self, plan: NetworkPlan, like: torch.Tensor, rows: int, orders: Sequence[Contraction]
    ) -> tuple[float, float, float]:
        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=like.device).to(like.dtype)

        ins, outs = prod(plan.in_modes), prod(plan.out_modes)
        terms, extents, _ = train_terms(plan.out_modes, plan.in_modes, plan.bonds, max(rows, 1))
        operands = [random(*(extents[leg] for leg in term)) for term in terms]
        x, matrix = operands[0].reshape(-1, ins), random(outs, ins)
        works = [partial(run_contraction, order, operands) for order in orders]
        works.append(partial(torch.nn.functional.linear, x, matrix))
        with torch.inference_mode():
            taken = samples(works, self._timer or Clock(like.device), rounds=_ROUNDS, cap=_CAP)
        first, second, dense = map(median, taken)
        return first, second, dense


# -- the calls -----------------------------------------------------------------------------------


class _Writer:
    """The calls that stand for one call of a site."""

    def __init__(
        self,
        edit: Edit,
        site: Site,
        call: fx.Node,
        bias: Any,
        cores: Sequence[fx.Node],
        plan: NetworkPlan,
    ) -> None:
        self.edit, self.site, self.before = edit, site, call
        self.bias, self.cores, self.plan = bias, list(cores), plan
        self.source = site.operand(call)
        self.axis = _axis(site, call)
        self.rank = len(value_of(self.source.meta["val"]).shape)
        self.sites = len(plan.out_modes)

    def contracted(self, order: Contraction) -> fx.Node:
        """The input's axis in its factors, one einsum after the other, and back to one axis."""
        tail = _TAIL[: self.rank - 1 - self.axis]
        lead = _LEAD[: self.axis]
        x = self._op(aten.unflatten.int, self.source, self.axis, list(self.plan.in_modes))
        values = [x, *self.cores]
        for step in order.steps:
            values.append(self._einsum(step, values, lead, tail))
        last = self.axis + self.sites - 1
        y = self._op(aten.flatten.using_ints, values[-1], self.axis, last)
        if self.bias is None:
            return y
        bias = self.bias
        if tail:
            bias = self._op(aten.reshape.default, bias, [-1, *[1] * len(tail)])
        return self._op(aten.add.Tensor, y, bias)

    def _einsum(self, step: Step, values: Sequence[fx.Node], lead: str, tail: str) -> fx.Node:
        def legs(text: str) -> str:
            # Behind the rows come the axes of an image; in front they would be moved twice.
            return lead + text[1:] + tail if text.startswith("m") else text.replace("m", lead)

        equation = f"{legs(step.legs[0])},{legs(step.legs[1])}->{legs(step.legs[2])}"
        return self._op(aten.einsum.default, equation, [values[step.left], values[step.right]])

    def built(self, order: Contraction) -> fx.Node:
        """The matrix from the cores, and the call that there was."""
        values: list[fx.Node] = [self.source, *self.cores]
        outs, ins = (
            "".join(chr(ord(first) + n) for n in range(self.sites)) for first in ("a", "A")
        )
        steps = [*order.steps[:-1]]
        for place, step in enumerate(steps):
            result = outs + ins if place == len(steps) - 1 else step.legs[2]
            equation = f"{step.legs[0]},{step.legs[1]}->{result}"
            values.append(
                self._op(aten.einsum.default, equation, [values[step.left], values[step.right]])
            )
        matrix = self._op(aten.flatten.using_ints, values[-1], 0, self.sites - 1)
        matrix = self._op(aten.flatten.using_ints, matrix, 1, self.sites)
        if self.site.kind != "convolution":
            given = () if self.bias is None else (self.bias,)
            return self._op(aten.linear.default, self.source, matrix, *given)
        for _ in self.site.kernel:
            matrix = self._op(aten.unsqueeze.default, matrix, -1)
        old = self.before
        bias = bias_of(old)
        weight = argument(old, "weight")

        def swap(node: fx.Node) -> fx.Node:
            return matrix if node is weight else self.bias if node is bias else node

        args = fx.map_arg(old.args, swap)
        kwargs = fx.map_arg(old.kwargs, swap)
        assert callable(old.target)
        return self.edit.call(old.target, args, kwargs, like=old, before=old)

    def _op(self, target: Any, *args: Any) -> fx.Node:
        return self.edit.call(target, args, like=self.before, before=self.before)


def _axis(site: Site, call: fx.Node) -> int:
    """Which axis of the input the matrix is multiplied with."""
    rank = len(value_of(site.operand(call).meta["val"]).shape)
    return rank - 1 - len(site.kernel)


def _steps(call: fx.Node, rank: int) -> list[int]:
    """Stride of a convolution per axis of its input."""
    stride = _list(argument(call, "stride", 1))
    kernel = len(value_of(argument(call, "weight").meta["val"]).shape) - 2
    stride = stride * kernel if len(stride) == 1 else stride
    return [1] * (rank - kernel) + stride


def _list(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
