"""Zeros in the weights of layers, in patterns that hardware or storage can use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from torchlathe.ir import Edit, OptionError, Program
from torchlathe.kernels.block_sparse.op import BLOCKS
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.factorising.sites import (
    Site,
    chosen_sites,
    find_sites,
    refuse_not_finite,
)
from torchlathe.passes.rewrite.factorising.telling import left_alone
from torchlathe.passes.rewrite.sparsifying.solving import Method, Solved, solve
from torchlathe.passes.rewrite.sweeping.calls import readers_of_sites
from torchlathe.passes.rewrite.sweeping.patterns import Pattern, parse_pattern
from torchlathe.passes.rewrite.sweeping.sweep import damping_of, naming
from torchlathe.passes.statistics.arriving import Arrival, arrivals
from torchlathe.passes.statistics.later import LaterCalls
from torchlathe.passes.statistics.running import flat_batches, need_data

__all__ = ["SparsifyNM"]


@dataclass(frozen=True)
class SparsifyNM(RewritePass):
    """Sets weights to zero in a pattern, and lets the others make up for them.

    Keeps: every node, and the shape of every tensor; tied weights stay tied. Changes: values. The
    mask is where the new weights are not zero; `heal`, and any training with
    `torchlathe.passes.tune.training.KeepMasks`, leaves the zeros as they are.

    Layers are done in order of execution, each with the data that the layers before it give by
    then; what other calls of it than the first read is taken as it was. Rows of a convolution's
    matrix run over the positions of the kernel with the channels innermost, so that N of M
    neighbours are channels.

    Source: see `torchlathe.passes.rewrite.sparsifying.solving`.
    """

    name: ClassVar[str] = "sparsify-nm"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    pattern: str = field(
        default="2:4",
        metadata={"help": 'N:M such as 2:4 or 4:8 (zeros among neighbours), "block", '
                  '"unstructured"'},
    )  # fmt: skip
    sparsity: float = field(
        default=0.5, metadata={"help": "share of zeros, for block and unstructured"}
    )
    block: int = field(default=32, metadata={"help": "side of a block, for block"})
    method: Method = field(
        default="sparsegpt",
        metadata={
            "help": "smallest magnitudes go; or, by the calibration data, smallest times the norm "
            "of what they read (wanda); or with the rest changed to make up for them (sparsegpt)"
        },
    )
    embeddings: bool = field(default=False, metadata={"help": "take embeddings too"})
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "only these: patterns of tensors, modules or families"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors, modules or families"}
    )
    damping: float = field(
        default=0.01,
        metadata={
            "help": "of sparsegpt: added to the diagonal of the moments at least, over its mean; "
            "more where few rows of data tell little"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: There is no such pattern, or a number is out of its range.
        """
        super().__post_init__()
        assert self._pattern is not None
        if not 0 < self.damping <= 1:
            raise OptionError(
                f"damping is {self.damping}, but must be above 0 and at most 1", where=self.name
            )

    @property
    def _pattern(self) -> Pattern:
        return parse_pattern(self.pattern, self.sparsity, self.block, self.name)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Make every layer sparse that has the pattern's shape."""
        sites, left = chosen_sites(
            *find_sites(program),
            self.include,
            self.exclude,
            embeddings=self.embeddings,
            where=self.name,
            families=lambda: ctx.analysis(ZeroInvariantGroups),
        )
        refuse_not_finite(program, sites)
        wanted, unfit = [], dict[str, str]()
        for site in sites:
            if reason := self._pattern.why_not(site.outs, _width(site, self._pattern)):
                unfit[site.weight] = reason
            else:
                wanted.append(site)
        told = [*left_alone(unfit, "warning"), *left_alone(left)]
        if not wanted:
            told.insert(0, Diagnostic("warning", "there is no layer that the pattern fits"))
            return PassResult(False, {"layers": 0}, told)
        layers = self._solve(program, ctx, wanted)
        told = [*_told(layers), *told, _no_faster(self._pattern)]
        return PassResult(True, _statistics(layers), told, details=_details(layers))

    def _solve(self, program: Program, ctx: PassContext, sites: Sequence[Site]) -> list[_Layer]:
        known = readers_of_sites(program, sites if self.method != "magnitude" else ())
        later = LaterCalls(program, {site.weight: own[1:] for site, own in known.items()})
        blind = [site for site in sites if site not in known]
        found: dict[Site, _Layer] = {}
        with program.edit(by=ctx.spec) as edit:
            for site in blind:
                self._one(edit, ctx, site, None, len(sites), found)
            if known:
                need_data(ctx, "zeros are chosen so that outputs on it stay as they are")
                batches = [flat for _, flat in flat_batches(program, ctx)]
                of = {own[0]: site for site, own in known.items()}
                for first in arrivals(program, batches, list(of)):
                    site = of[first.reader]
                    arrival = later.joined(site.weight, first, batches)
                    with naming(site.weight, "made sparse"):
                        self._one(edit, ctx, site, arrival, len(sites), found)
                    _warn_of_few(ctx, site, min(arrival.counts))
        return [found[site] for site in sites]

    def _one(
        self,
        edit: Edit,
        ctx: PassContext,
        site: Site,
        arrival: Arrival | None,
        count: int,
        found: dict[Site, _Layer],
    ) -> None:
        ctx.report(f"zeros in {site.weight} ({len(found) + 1}/{count})")
        old = edit.program.tensor(site.weight).detach()
        method: Method = "magnitude" if arrival is None else self.method
        solved = []
        for group, matrix in enumerate(site.matrices(old)):
            order = site.channels_last(matrix.device)
            moment, damping = None, self.damping
            if arrival is not None:
                moment = arrival.moments[group][order[:, None], order]
                damping = damping_of(moment, arrival.counts[group], self.damping)
            solved.append(solve(matrix[:, order], moment, self._pattern, method, damping=damping))
        back = site.channels_last(old.device).argsort()
        new = site.weight_from(torch.stack([one.weight[:, back] for one in solved]))
        edit.set_tensor(site.weight, new.to(old.dtype).contiguous())
        found[site] = _Layer(site, method, self._pattern, solved)


@dataclass(frozen=True)
class _Layer:
    """What became of one parameter; one `Solved` for each group."""

    site: Site
    method: Method
    pattern: Pattern
    solved: Sequence[Solved]

    @property
    def zeros(self) -> float:
        """Share of zeros."""
        kept = sum(float(one.mask.sum()) for one in self.solved)
        return 1 - kept / sum(one.mask.numel() for one in self.solved)

    @property
    def error(self) -> float:
        """Mean relative squared error."""
        return sum(one.error for one in self.solved) / len(self.solved)

    @property
    def magnitude(self) -> float:
        """The same for the smallest magnitudes."""
        return sum(one.magnitude for one in self.solved) / len(self.solved)


def _width(site: Site, pattern: Pattern) -> int:
    """Columns that neighbours may be among: of a convolution the channels."""
    return site.ins if pattern.kind == "unstructured" else site.channels


def _warn_of_few(ctx: PassContext, site: Site, rows: int) -> None:
    if rows < site.ins:
        text = f"{rows} rows of calibration data for {site.ins} columns: the rest is damped"
        ctx.tell(Diagnostic("warning", text, name=site.weight))


def _statistics(layers: Sequence[_Layer]) -> dict[str, int | float | str]:
    whole = sum(layer.site.parameters for layer in layers)
    return {
        "layers": len(layers),
        "weights": whole,
        "zeros": sum(layer.zeros * layer.site.parameters for layer in layers) / whole,
        "mean_error": sum(layer.error for layer in layers) / len(layers),
        "mean_error_magnitude": sum(layer.magnitude for layer in layers) / len(layers),
    }


def _details(layers: Sequence[_Layer]) -> dict[str, Any]:
    rows = [
        {
            "layer": layer.site.weight,
            "pattern": str(layer.pattern),
            "method": layer.method,
            "zeros": layer.zeros,
            "error": layer.error,
            "error_magnitude": layer.magnitude,
        }
        for layer in layers
    ]
    return {"sparse": rows}


def _told(layers: Sequence[_Layer]) -> Iterator[Diagnostic]:
    for layer in layers:
        what = "of the weight" if layer.method == "magnitude" else "of the outputs"
        text = (
            f"{layer.pattern} by {layer.method}: {layer.zeros:.1%} zeros, relative squared error "
            f"{what} {layer.error:.2g}"
        )
        if layer.method != "magnitude":
            text += f", by magnitude alone {layer.magnitude:.2g}"
        yield Diagnostic("note", text, name=layer.site.weight)


def _no_faster(pattern: Pattern) -> Diagnostic:
    """What weights with these zeros run as, which `fuse-kernels` decides."""
    text = f"weights with zeros ({pattern}) run as dense ones"
    if pattern.kind == "block" and pattern.span % min(BLOCKS) == 0:
        text += ", unless fuse-kernels after this puts block_sparse_linear where it is faster"
    elif (pattern.keep, pattern.span) == (2, 4):
        text += (
            ": no product of 2:4 weights was measured to be faster on a CPU; on a GPU fuse-kernels "
            "takes semi_structured_linear where a table of the device says that it is"
        )
    else:
        text += ": no op takes this pattern"
    return Diagnostic("note", text)
