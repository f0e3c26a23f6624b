"""Fewer bits for the weights of layers, and for their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import OptionError, Program
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.quantities import quantity
from torchlathe.passes.rewrite.allocation.budgets import UNITS
from torchlathe.passes.rewrite.factorising.sites import (
    Site,
    chosen_sites,
    find_sites,
    refuse_not_finite,
)
from torchlathe.passes.rewrite.factorising.telling import left_alone, listed
from torchlathe.passes.rewrite.quantising.balancing import Balance, balance
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.quantising.grids import Clip, Quantised, blank, quantised
from torchlathe.passes.rewrite.quantising.mixing import mix
from torchlathe.passes.rewrite.quantising.rotating import rotate
from torchlathe.passes.rewrite.quantising.schemes import SCHEMES, Scheme, scheme_of
from torchlathe.passes.rewrite.quantising.streaming import Gptq, Job, Outcome, stream
from torchlathe.passes.rewrite.quantising.writing import Written, matrix_of, write
from torchlathe.passes.rewrite.sweeping.calls import readers_of_sites
from torchlathe.passes.rewrite.sweeping.patterns import Pattern, parse_pattern
from torchlathe.passes.rewrite.sweeping.sweep import relative_error
from torchlathe.passes.statistics import Reader
from torchlathe.passes.statistics.later import LaterCalls
from torchlathe.passes.statistics.routed import Routed
from torchlathe.passes.statistics.running import need_data
from torchlathe.passes.statistics.storage import usable_folder

__all__ = ["Quantize"]

SchemeName = Literal["w8a8", "w8a16", "w4a16", "w4a8", "w2a16", "fp8", "mxfp4", "nvfp4"]

# What a budget chooses from, if nothing is said, among those of like activations.
_MIXED: tuple[SchemeName, ...] = ("w4a16", "w8a16", "w4a8", "w8a8")


@dataclass(frozen=True)
class Quantize(RewritePass):
    """Stores weights in few bits, and rounds the inputs of layers where the scheme says so.

    Keeps: every other node; tied weights stay tied. Changes: each weight becomes numbers and
    scales that ``torchlathe::dequantize`` reads for the layer, which stays the op that it was
    (look-ups in embeddings read stored rows); inputs go through
    ``torchlathe::quantize_dequantize_tokens``. Kernels are chosen later, by ``fuse-kernels``.

    Source: see the modules beside this one.
    """

    name: ClassVar[str] = "quantize"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    scheme: SchemeName = field(
        default="w8a8",
        metadata={
            "help": "bits of weights and activations: integers, fp8 (e4m3, both), or the 4-bit "
            "floats mxfp4 and nvfp4 for weights; activations have a scale for each token"
        },
    )  # fmt: skip
    group: int | None = field(
        default=None,
        metadata={
            "help": "columns that share a scale: 32, 64 or 128, or 0 for a whole row; by default "
            "128 for 4 bits and a whole row for 8"
        },
    )
    symmetric: bool | None = field(
        default=None,
        metadata={"help": "whether numbers have no zero point; by default as the scheme has it"},
    )
    method: Literal["rtn", "gptq"] = field(
        default="rtn",
        metadata={
            "help": "round each weight to nearest, or column by column with the error of each "
            "made up for by those after it, on the calibration data"
        },
    )
    clip: Clip = field(
        default="mse",
        metadata={
            "help": "whether ranges are shrunk where that makes the squared error less, or cover "
            "the largest weight"
        },
    )
    balance: Balance = field(
        default="none",
        metadata={
            "help": "move scales from activations to weights before rounding, by the sizes of "
            "both (smoothquant) or of activations (awq), where a neighbour can take them exactly"
        },
    )
    rotate: bool = field(
        default=False,
        metadata={
            "help": "rotate the residual stream by a Hadamard matrix first, folded into what "
            "writes and reads it, where only linear maps and RMSNorms touch it"
        },
    )
    insert: bool = field(
        default=False,
        metadata={
            "help": "of balance: where no neighbour can take a scale, multiply the activations"
        },
    )
    bytes: float | str | None = field(
        default=None,
        metadata={
            "help": "bytes of tensors of the whole model to keep: a share up to 1, or a size such "
            "as 40MB; each layer gets the scheme that the outputs allow it"
        },
    )
    latency: float | str | None = field(
        default=None,
        metadata={
            "help": "of the measured time of the whole model on the example inputs: a share, or an "
            "amount such as 5ms; alone or together with bytes"
        },
    )
    schemes: tuple[SchemeName, ...] = field(
        default=(),
        metadata={
            "help": "of budgets: what a layer may get, besides staying as it is; by default the "
            "scheme and those of 4 and 8 bits with like activations"
        },
    )
    embeddings: bool = field(
        default=False,
        metadata={"help": "quantise embeddings too, and what is tied to them"},
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={"help": "quantise only these: patterns of tensors, modules or families"},
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors, modules or families"}
    )
    damping: float = field(
        default=0.01,
        metadata={
            "help": "of gptq: added to the diagonal of the moments at least, relative to its mean; "
            "more where few rows of data tell little"
        },
    )
    act_order: bool = field(
        default=True,
        metadata={
            "help": "of gptq: columns that the data excites most come first; not where a pattern "
            "is chosen"
        },
    )
    pattern: str | None = field(
        default=None,
        metadata={
            "help": "of gptq: zeros in N of M neighbours, such as 2:4, chosen in the same sweep; "
            "weights that are zero before stay so in any case"
        },
    )
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "of gptq: folder for finished layers, to go on from when interrupted"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of its range, or two contradict one another.
        """
        super().__post_init__()
        assert self._scheme is not None
        if not 0 < self.damping <= 1:
            raise OptionError(
                f"damping is {self.damping}, but must be above 0 and at most 1", where=self.name
            )
        if self.schemes and not self._budgets:
            raise OptionError(
                "schemes are what a budget chooses from, and there is none",
                where=self.name,
                hint="give bytes=0.25, or scheme for all layers",
            )
        for name, asked in self._budgets.items():
            quantity(asked, UNITS[name], name=name, where=self.name)
        if self.pattern is not None:
            self._check_pattern()
        if self.checkpoint is not None and self.method != "gptq":
            raise OptionError(
                "checkpoint keeps the layers of method=gptq",
                where=self.name,
                hint="leave checkpoint out: rounding to nearest takes seconds",
            )

    def _check_pattern(self) -> None:
        if self.method != "gptq":
            raise OptionError(
                "pattern needs the sweep of method=gptq",
                where=self.name,
                hint="make zeros first: sparsify-nm, then quantize",
            )
        assert self._pattern is not None
        if self._pattern.kind != "n:m":
            raise OptionError(
                f"the pattern {self.pattern} is not chosen in a sweep",
                where=self.name,
                hint="give N:M, or make zeros first: sparsify-nm, then quantize",
            )

    @property
    def _budgets(self) -> dict[str, float | str]:
        asked = {"bytes": self.bytes, "latency": self.latency}
        return {name: amount for name, amount in asked.items() if amount is not None}

    @property
    def _pattern(self) -> Pattern | None:
        return None if self.pattern is None else parse_pattern(self.pattern, 0.5, 32, self.name)

    @property
    def _scheme(self) -> Scheme:
        return scheme_of(self.scheme, self.group, self.symmetric, self.name)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Round every layer, then sweep those that the method asks for."""
        sites, left = chosen_sites(
            *find_sites(program),
            self.include,
            self.exclude,
            embeddings=self.embeddings,
            where=self.name,
            families=lambda: ctx.analysis(ZeroInvariantGroups),
        )
        left = {name: reason.replace("splits", "quantises") for name, reason in left.items()}
        if self.balance != "none":
            need_data(ctx, "scales are chosen by its channels")
        if self.method == "gptq":
            need_data(ctx, "columns make up for one another so that outputs on it stay as they are")
        refuse_not_finite(program, sites)
        plans, diagnostics = _plans(program, sites, self._scheme, left)
        mixed: dict[str, int | float | str] = {}
        if self._budgets and plans:
            need_data(ctx, "the schemes of layers are chosen by what they do to the outputs on it")
            plans, mixed = self._mixed(program, ctx, plans, left)
        if not plans:
            diagnostics.append(Diagnostic("warning", "there is no layer to quantise"))
            return PassResult(False, {"layers": 0}, [*diagnostics, *left_alone(left)])
        bytes_before = program.cost().bytes
        moved: dict[str, int | float | str] = {}
        if self.rotate:
            moved["rotated"] = _rotated(program, ctx)
        if self.balance != "none":
            moved |= balance(program, ctx, plans, self.balance, self.clip, insert=self.insert)
        known = readers_of_sites(program, plans if self.method == "gptq" else ())
        later = LaterCalls(program, {site.weight: own[1:] for site, own in known.items()})
        layers = self._round(program, ctx, plans, known)
        outcomes = self._sweep(program, ctx, layers, later)
        layers = [layer.after(outcomes.get(layer.site.weight)) for layer in layers]
        if self.pattern is not None and self.act_order:
            text = "act_order is without effect where a pattern is chosen: neighbours stay together"
            diagnostics.append(Diagnostic("note", text))
        diagnostics += [*_told(layers, outcomes), *left_alone(left)]
        statistics = {**_statistics(program, layers, outcomes, bytes_before), **moved, **mixed}
        return PassResult(True, statistics, diagnostics, details=_details(layers, outcomes))

    def _mixed(
        self, program: Program, ctx: PassContext, plans: Mapping[Site, Scheme], left: dict[str, str]
    ) -> tuple[dict[Site, Scheme], dict[str, int | float | str]]:
        """A scheme for each layer within the budget; those that get none are left alone."""
        alike = [n for n in _MIXED if SCHEMES[n].activations == self._scheme.activations]
        names = self.schemes or tuple(dict.fromkeys((self.scheme, *alike)))
        allowed: dict[Site, list[Scheme]] = {site: [] for site in plans}
        for name in names:
            own = self._scheme if name == self.scheme else SCHEMES[name]
            for site, scheme in _plans(program, list(plans), own, {})[0].items():
                allowed[site].append(scheme)
        found = mix(program, ctx, allowed, self._budgets, self.clip, self.name)
        left |= dict.fromkeys(found.dense, "the budget leaves it as it is")
        return found.plans, {
            "left_dense": len(found.dense),
            "expected_output_error": found.expected,
            **found.amounts,
        }

    def _round(
        self,
        program: Program,
        ctx: PassContext,
        plans: Mapping[Site, Scheme],
        readers: Mapping[Site, Sequence[Reader | Routed]],
    ) -> list[_Layer]:
        layers = []
        rounded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        with program.edit(by=ctx.spec) as edit:
            for number, (site, scheme) in enumerate(plans.items()):
                ctx.report(f"rounding {site.weight} ({number + 1}/{len(plans)})")
                weight = program.tensor(site.weight).detach()
                matrix = matrix_of(site, weight)
                reader = readers[site][0] if site in readers else None
                how: dict[str, Any] = {"group": scheme.group, "symmetric": scheme.symmetric}
                error = 0.0
                if reader is None:
                    stored = quantised(matrix, scheme.weights, clip=self.clip, **how)
                    error = _error(matrix, stored)
                else:
                    # What is swept later needs no more than its form here.
                    stored = blank(matrix, scheme.weights, **how)
                written = write(edit, site, stored, scheme.activations, rounded)
                job = None if reader is None else Job(written, weight, scheme, reader)
                layers.append(_Layer(site, scheme, written, error, stored.nbytes, job))
        return layers

    def _sweep(
        self, program: Program, ctx: PassContext, layers: Sequence[_Layer], later: LaterCalls
    ) -> dict[str, Outcome]:
        folder = None if self.checkpoint is None else usable_folder(self.checkpoint, "checkpoint")
        key = str(replace(self, checkpoint=None))
        how = Gptq(self.damping, self.act_order, self.clip, self._pattern, folder, key)
        jobs = [layer.job for layer in layers if layer.job is not None]
        if not jobs:
            return {}
        with program.edit(by=ctx.spec) as edit:
            return stream(edit, ctx, jobs, how, later)


@dataclass(frozen=True)
class _Layer:
    """What became of one site.

    Attributes:
        error: Relative squared error of the weight.
        job: What is still to be swept, or None.
    """

    site: Site
    scheme: Scheme
    written: Written
    error: float
    nbytes: int
    job: Job | None

    def after(self, outcome: Outcome | None) -> _Layer:
        """As it is when it was swept."""
        return self if outcome is None else replace(self, error=outcome.weight, job=None)


def _error(matrix: torch.Tensor, stored: Quantised) -> float:
    return relative_error(matrix, stored.dequantised(matrix.dtype))


def _plans(
    program: Program, sites: Sequence[Site], scheme: Scheme, left: dict[str, str]
) -> tuple[dict[Site, Scheme], list[Diagnostic]]:
    """A scheme for each site that is worth it; ``left`` takes why others are not."""
    plans: dict[Site, Scheme] = {}
    small: list[str] = []
    for site in sites:
        own = scheme
        if own.group > site.ins and own.format.block is None:
            small.append(site.weight)
            own = replace(own, group=0)
        rows, weight = site.outs * site.groups, program.tensor(site.weight)
        if own.layout(site.ins, weight.dtype).nbytes(rows) >= weight.nbytes:
            left[site.weight] = "its numbers and scales would take no fewer bytes"
            continue
        plans[site] = own
    told = []
    if small:
        text = f"one scale a row, for rows shorter than a group of {scheme.group}: {listed(small)}"
        told.append(Diagnostic("warning", text, name=small[0]))
    return plans, told


def _rotated(program: Program, ctx: PassContext) -> int:
    """The channels of the stream that was rotated; what that does to zeros is told."""
    before = {
        name: _zeros(weight) for name, weight in program.parameters.items() if weight.dim() > 1
    }
    channels = rotate(program, ctx)
    lost = [name for name, zeros in before.items() if zeros > _zeros(program.tensor(name))]
    if lost:
        text = (
            f"{len(lost)} weights had zeros that the rotation did not keep: {listed(lost)}; make "
            "zeros in the sweep (pattern), or leave rotate out"
        )
        ctx.tell(Diagnostic("warning", text, name=lost[0]))
    return channels


def _zeros(weight: torch.Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


def _statistics(
    program: Program, layers: Sequence[_Layer], outcomes: Mapping[str, Outcome], before: int
) -> dict[str, int | float | str]:
    whole = sum(layer.site.parameters for layer in layers)
    found: dict[str, int | float | str] = {
        "layers": len(layers),
        "weights": whole,
        "bits_per_weight": 8 * sum(layer.nbytes for layer in layers) / whole,
        "bytes_saved": before - program.cost().bytes,
        "mean_weight_error": sum(layer.error for layer in layers) / len(layers),
    }
    if outcomes:
        count = len(outcomes)
        found["swept"] = count
        found["resumed"] = sum(o.resumed for o in outcomes.values())
        found["mean_output_error_nearest"] = sum(o.nearest for o in outcomes.values()) / count
        found["mean_output_error"] = sum(o.error for o in outcomes.values()) / count
    return found


def _details(layers: Sequence[_Layer], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    rows = []
    for layer in layers:
        row = {
            "layer": layer.site.weight,
            "format": layer.scheme.weights,
            "group": layer.scheme.group,
            "activations": layer.scheme.activations or "",
            "bytes": layer.nbytes,
            "weight_error": layer.error,
        }
        if outcome := outcomes.get(layer.site.weight):
            row |= {"output_error_nearest": outcome.nearest, "output_error": outcome.error}
        rows.append(row)
    return {"quantised": rows}


def _told(layers: Sequence[_Layer], outcomes: Mapping[str, Outcome]) -> Iterator[Diagnostic]:
    """A line for each layer."""
    for layer in layers:
        name, scheme = layer.site.weight, layer.scheme
        group = f", groups of {scheme.group}" if scheme.group else ""
        text = f"{scheme.weights}{group}: relative squared error {layer.error:.2g}"
        if outcome := outcomes.get(name):
            text = (
                f"{scheme.weights}{group}: relative squared error of the outputs "
                f"{outcome.error:.2g}, rounded to nearest {outcome.nearest:.2g}"
            )
        yield Diagnostic("note", text, name=name)
