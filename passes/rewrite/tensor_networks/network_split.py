"""What the passes that write layers as networks have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from torchlathe.ir import Program
from torchlathe.ir.axes import AxisTerms, Concat, Product, Term
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.factorising.amounts import SplitOptions
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.sensitivity import Effects, output_weights
from torchlathe.passes.rewrite.factorising.sites import Site, chosen_sites, find_sites
from torchlathe.passes.rewrite.factorising.telling import left_alone, listed
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.tensor_networks.choosing import (
    Chosen,
    allotted,
    by_error,
    of_rank,
    plans_of,
    uniform,
)
from torchlathe.passes.rewrite.tensor_networks.plans import (
    NetworkKind,
    NetworkPlan,
    modes_of,
    network_cores,
    network_error,
)
from torchlathe.passes.rewrite.tensor_networks.telling import profile, statistics, told
from torchlathe.passes.rewrite.tensor_networks.trains import dense
from torchlathe.passes.rewrite.tensor_networks.writing import (
    LayerClock,
    Lowered,
    Lowering,
    can_write,
    write_network,
)

__all__ = ["Modes", "NetworkSources", "NetworkSplit"]

Modes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class NetworkSources:
    """Where a split has its statistics from.

    Attributes:
        metrics: Collects what a method needs to know of the data.
        effects: Measures what errors in each layer do to the outputs.
        plans: Gives the plans of a site's matrix, as `network_plans`; by the name of the weight.
    """

    metrics: Callable[[Program, PassContext, Sequence[Site], str], Metrics] = collect_metrics
    effects: Effects = output_weights
    plans: Callable[..., list[NetworkPlan]] = plans_of


@dataclass(frozen=True)
class NetworkSplit(SplitOptions, RewritePass):
    """Writes linear layers and 1 x 1 convolutions as networks of small tensors.

    Keeps: shapes and calls of everything else, biases, and ties. Changes: each split parameter
    becomes ``core1``, ``core2``, ..., whose bonds later passes see as free axes. A layer is only
    split where that makes it smaller.

    Source: see `torchlathe.passes.rewrite.tensor_networks.trains`.
    """

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)
    kind: ClassVar[NetworkKind]

    method: Literal["svd", "whitened"] = field(
        default="whitened",
        metadata={
            "help": "the norm in which a network is best: of the weight, or of the outputs on the "
            "calibration data"
        },
    )
    bond: int | None = field(
        default=None, metadata={"help": "most that any bond may be, beside what says how much"}
    )
    error: float | None = field(
        default=None,
        metadata={
            "help": "relative error that the outputs of each layer may have, instead of how much "
            "to keep"
        },
    )
    sweeps: int = field(
        default=2,
        metadata={"help": "how often the cores are fitted in turn to the calibration data"},
    )
    lowering: Lowering = field(
        default="auto",
        metadata={
            "help": "contract the cores with the input, or build the matrix from them in each run; "
            "auto takes what is faster for the rows of the input"
        },
    )
    rows: int | None = field(
        default=None,
        metadata={"help": "rows of the input to choose that by; by default the example inputs'"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: More than one option says how much, one is out of its range, or they
                contradict one another.
        """
        super().__post_init__()
        self.check_split()
        if self.latency is not None:
            raise self.refused(
                "latency is no budget of this pass",
                "low-rank-split{method=mixed,latency=...} measures networks too",
            )
        amounts = ("share", "params", "bytes", "flops", "rank")
        given = [name for name in amounts if getattr(self, name) is not None]
        if self.error is not None and given:
            raise self.refused(f"error and {given[0]} both say how much to keep", "give one")
        if self.error is not None and not 0 < self.error < 1:
            raise self.refused(f"error is {self.error}, but must be between 0 and 1")
        for name, least in (("bond", 1), ("rows", 1), ("sweeps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise self.refused(f"{name} is {value}, but must be at least {least}")

    @property
    def same_for_all(self) -> str | None:
        """As for every split; an error is said of each layer too."""
        return super().same_for_all or (None if self.error is None else "error")

    @abstractmethod
    def modes(self, site: Site, structures: Modes) -> Modes | None:
        """Factors of the outputs and inputs of a site; None where it has none.

        Args:
            site: The layer.
            structures: How its axes are cut already.
        """

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Collect what the method needs, choose bonds, and write one layer at a time."""
        return self.run_with(program, ctx, NetworkSources())

    def run_with(self, program: Program, ctx: PassContext, sources: NetworkSources) -> PassResult:
        """As `run`, with statistics from elsewhere, for instance from an earlier run."""
        sites, modes, left = self._sites(program, ctx)
        if not sites:
            nothing = Diagnostic("warning", "there is no layer to split")
            return PassResult(False, {"layers": 0}, [nothing, *left_alone(left)])
        known = "svd" if self.method == "svd" else "whitened-svd"
        metrics = sources.metrics(program, ctx, sites, known)
        diagnostics = list(self._plain(sites, metrics))
        chosen, metrics = self._choose(program, ctx, sites, modes, metrics, left, sources)
        diagnostics += chosen.diagnostics
        plans, lowered = self._write(program, ctx, chosen.plans, metrics)
        for site in sites:
            if site not in plans:
                left.setdefault(site.weight, "the budget is best spent on it")
        diagnostics += [*told(plans, lowered), *left_alone(left)]
        fitted = self.method != "svd" and self.sweeps > 0
        curves = profile(sites, chosen.options, plans, estimated=fitted)
        details = {"layer_profile": curves}
        numbers = statistics(sites, plans, lowered)
        return PassResult(bool(plans), numbers, diagnostics, details=details)

    def _sites(
        self, program: Program, ctx: PassContext
    ) -> tuple[list[Site], dict[Site, Modes], dict[str, str]]:
        """Layers with the factors of their axes, and why the others have none."""
        found, left = chosen_sites(
            *find_sites(program), self.include, self.exclude, embeddings=True, where=self.name
        )
        sites, modes = [], {}
        for site in found:
            reason = can_write(site)
            if reason is None:
                factors = self.modes(site, _structures(program, ctx, site))
                if factors is not None:
                    sites.append(site)
                    modes[site] = factors
                    continue
                reason = "its extents have too few factors"
            left[site.weight] = reason
        return sites, modes, left

    def _choose(
        self,
        program: Program,
        ctx: PassContext,
        sites: Sequence[Site],
        modes: Mapping[Site, Modes],
        metrics: Metrics,
        left: dict[str, str],
        sources: NetworkSources,
    ) -> tuple[Chosen, Metrics]:
        how = self.shared_out(len(sites))
        if self.rank is not None:
            return of_rank(self, sites, modes, left), metrics
        if self.error is not None:
            return by_error(self, program, ctx, sites, modes, metrics, left), metrics
        if how == "uniform":
            return uniform(self, program, sites, modes, left), metrics
        if self.weigh == "output":
            known = "svd" if self.method == "svd" else "whitened-svd"
            weights = sources.effects(program, ctx, sites, metrics, known, self.damping)
            metrics = replace(metrics, effects=weights)
        exact = how == "exact"
        return allotted(self, program, ctx, sites, modes, metrics, sources.plans, exact), metrics

    def cores(
        self, plan: NetworkPlan, matrix: torch.Tensor, moment: torch.Tensor | None, seed: int
    ) -> list[torch.Tensor]:
        """As `network_cores`, by the options."""
        return network_cores(
            plan, matrix, moment, damping=self.damping, sweeps=self.sweeps, seed=seed
        )

    def _plain(self, sites: Sequence[Site], metrics: Metrics) -> Iterator[Diagnostic]:
        """A warning about sites whose data the method could not see."""
        unseen = [site.weight for site in sites if site not in metrics.inputs]
        if self.method != "svd" and unseen:
            text = f"split by plain singular values, for want of data: {listed(unseen)}"
            yield Diagnostic("warning", text)

    def _write(
        self,
        program: Program,
        ctx: PassContext,
        plans: Mapping[Site, NetworkPlan],
        metrics: Metrics,
    ) -> tuple[dict[Site, NetworkPlan], dict[Site, list[Lowered]]]:
        clock = LayerClock() if self.time else None
        done: dict[Site, NetworkPlan] = {}
        lowered: dict[Site, list[Lowered]] = {}
        with program.edit(by=ctx.spec) as edit:
            for number, (site, plan) in enumerate(plans.items()):
                ctx.report(f"splitting {site.weight} ({number + 1}/{len(plans)})")
                matrices = site.matrices(program.tensor(site.weight).detach())
                moment = metrics.moment([site])
                cores = self.cores(plan, matrices[0], moment, ctx.seed)
                error = network_error(cores, matrices[0], moment)
                product = dense([core.double() for core in cores])
                shift = metrics.shift([site], 0, matrices, [(product,)])
                done[site] = replace(plan, error=error)
                lowered[site] = write_network(
                    edit,
                    site,
                    plan,
                    cores,
                    shift,
                    lowering=self.lowering,
                    rows=self.rows,
                    clock=clock,
                    by_flops=self.flops is not None,
                )
        return done, lowered

    def plain_modes(self, site: Site, structures: Modes, sites: int, skew: int) -> Modes | None:
        """Factors by `modes_of`."""
        return modes_of(
            self.kind, site.outs, site.ins, sites=sites, skew=skew, structures=structures
        )


def _structures(program: Program, ctx: PassContext, site: Site) -> Modes:
    """How the axes of a weight are cut by the views around it: 12 heads of 32."""
    terms = ctx.analysis(AxisTerms).terms(program.tensor_nodes[site.weight])

    def cut(place: int) -> tuple[int, ...]:
        term = terms[place]
        parts: tuple[Term, ...] = (term,)
        count: tuple[int, ...] = ()
        if isinstance(term, Concat) and len({piece.extent for piece in term.pieces}) == 1:
            # Queries, keys and values end to end: three times what one of them is.
            parts, count = term.pieces[:1], (len(term.pieces),)
        factors = [f.extent for p in parts for f in (p.factors if isinstance(p, Product) else (p,))]
        extents = [*count, *factors]
        if isinstance(parts[0], Concat) or not all(isinstance(e, int) for e in extents):
            return ()
        return tuple(int(extent) for extent in extents)

    outs, ins = (1, 0) if site.transposed else (0, 1)
    return cut(outs), cut(ins)
