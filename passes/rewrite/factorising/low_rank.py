"""Layers as products of two smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeAlias, get_args

from torchlathe.ir import Program
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.factorising.allotting import Allotment, Wanted, allot, uniform
from torchlathe.passes.rewrite.factorising.amounts import SplitOptions
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.networks import (
    Networks,
    make_any,
    plans_of_networks,
    write_any,
)
from torchlathe.passes.rewrite.factorising.plans import Form, Plan
from torchlathe.passes.rewrite.factorising.residuals import split_with_residuals
from torchlathe.passes.rewrite.factorising.sensitivity import Effects, output_weights
from torchlathe.passes.rewrite.factorising.sites import Site, chosen_sites, find_sites
from torchlathe.passes.rewrite.factorising.telling import (
    left_alone,
    listed,
    profile,
    statistics,
    told,
)
from torchlathe.passes.rewrite.factorising.timing import seconds_of, slower, table_for
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.rewrite.quantising.schemes import SCHEMES

__all__ = ["LowRankSplit", "Sources"]

Method: TypeAlias = Literal[
    "svd", "whitened-svd", "joint", "tensor-train", "kronecker", "spatial", "tucker", "cp"
]


@dataclass(frozen=True)
class Sources:
    """Where a split has its statistics from.

    Attributes:
        metrics: Collects what a method needs to know of the data.
        effects: Measures what errors in each layer do to the outputs.
        networks: Fits networks of one kind to a layer, to choose among.
    """

    metrics: Callable[[Program, PassContext, Sequence[Site], str], Metrics] = collect_metrics
    effects: Effects = output_weights
    networks: Networks = plans_of_networks


@dataclass(frozen=True)
class LowRankSplit(SplitOptions, RewritePass):
    """Splits linear layers, convolutions and embeddings into two or three smaller ones.

    Keeps: shapes and calls of everything else; biases stay on the last factor. Changes: each split
    parameter becomes a ``down`` and an ``up`` with a rank axis between them, which later passes see
    as any other free axis. A layer is only split where that makes it smaller.

    Source: see `torchlathe.passes.rewrite.factorising.splits`.
    """

    name: ClassVar[str] = "low-rank-split"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    method: Literal["svd", "whitened-svd", "fisher-weighted", "mixed"] = field(
        default="whitened-svd",
        metadata={
            "help": "the norm in which a split is best: of the weight, of the outputs on the "
            "calibration data, or of the weight with rows weighted by the Fisher information; "
            "mixed chooses for each layer among dense, svd, whitened, joint, the forms of "
            "convolutions, tensor trains and Kronecker sums"
        },
    )
    among: tuple[Method, ...] = field(
        default=(),
        metadata={"help": "what mixed chooses among, next to dense; all of them if not said"},
    )
    joint: bool = field(
        default=False,
        metadata={
            "help": "layers that read the same input share the factor that reads it, such as "
            "queries, keys and values; mixed decides that itself"
        },
    )
    convolutions: Literal["channel", "spatial", "tucker", "cp"] = field(
        default="channel",
        metadata={
            "help": "form of convolutions: few channels and then 1x1; kx1 and then 1xk; 1x1, a "
            "small kernel, 1x1; or 1x1, a kernel for each channel alone, 1x1; mixed decides that "
            "itself"
        },
    )
    remainder: float = field(
        default=0.0,
        metadata={
            "help": "share of the rows of each matrix that are kept as they are, those that a "
            "product of the rank misses most; mixed decides for each layer whether to keep them"
        },
    )
    residual: Literal["none", "w8a16", "w4a16", "w2a16", "mxfp4", "nvfp4"] = field(
        default="none",
        metadata={
            "help": "keep what the product of a linear layer's factors misses as numbers of few "
            "bits, by a scheme of quantize; rank says the size of the product"
        },
    )
    rounding: Literal["gptq", "nearest"] = field(
        default="gptq",
        metadata={
            "help": "how the residual is rounded: column by column, those to come making up for "
            "those that are done, or to nearest; without data always to nearest"
        },
    )
    embeddings: bool | None = field(
        default=None,
        metadata={"help": "split embeddings too; if not said, where params or bytes is given"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: More than one option says how much, one is out of its range, or they
                contradict one another.
        """
        super().__post_init__()
        self.check_split()
        self.check_shares("remainder")
        if self.remainder and self.joint:
            raise self.refused(
                "layers that share a factor keep no rows", "leave out joint or remainder"
            )
        if self.latency is not None and self.allocation == "uniform":
            raise self.refused(
                "what a share of a layer's parameters takes in time differs between layers, so "
                "that allocation=uniform does not go with latency"
            )
        if self.residual != "none" and (self.rank is None or self.remainder or self.joint):
            raise self.refused(
                "with a residual in few bits, rank says how large the products are, and neither "
                "remainder nor joint goes with it",
                "give rank=16, say",
            )
        if self.residual != "none" and self.method not in ("svd", "whitened-svd"):
            raise self.refused(f"residual goes with svd and whitened-svd, not {self.method}")
        if self.among and self.method != "mixed":
            raise self.refused("among is what mixed chooses among", "set method=mixed")
        if self.method == "mixed" and (self.rank is not None or self.allocation == "uniform"):
            raise self.refused(
                "method=mixed chooses for each layer, so that neither rank nor "
                "allocation=uniform goes with it"
            )

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights, or no loss where one is needed.
        """
        self.need_values(program)
        fisher = self.method == "fisher-weighted"
        if fisher and ctx.loss is None and "loss" not in str(program.out_spec):
            ctx.need("loss", "the Fisher information is made of its gradients")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Collect what the method needs, choose ranks, and split one layer at a time."""
        return self.run_with(program, ctx, Sources())

    def run_with(self, program: Program, ctx: PassContext, sources: Sources) -> PassResult:
        """As `run`, with statistics from elsewhere, for instance from an earlier run."""
        whole_model = self.params is not None or self.bytes is not None
        sites, left = chosen_sites(
            *find_sites(program),
            self.include,
            self.exclude,
            embeddings=whole_model if self.embeddings is None else self.embeddings,
            where=self.name,
            families=lambda: ctx.analysis(ZeroInvariantGroups),
        )
        diagnostics: list[Diagnostic] = []
        if not sites:
            diagnostics += [Diagnostic("warning", "there is no layer to split"), *left_alone(left)]
            return PassResult(False, {"layers": 0}, diagnostics)
        metrics = sources.metrics(program, ctx, sites, self.method)
        diagnostics += self._plain(sites, metrics)
        if self.residual != "none" and self.rank is not None:
            return split_with_residuals(
                program,
                ctx,
                sites,
                left,
                metrics,
                rank=self.rank,
                scheme=SCHEMES[self.residual],
                damping=self.damping,
                sweeps=self.rounding == "gptq",
            )
        how = self.shared_out(len(sites))
        if how == "uniform":
            allotment = uniform(self._wanted, program, sites, metrics, left)
        else:
            measured = sources.effects, sources.networks
            allotment = allot(self._wanted, program, ctx, sites, metrics, how, *measured)
        diagnostics += allotment.diagnostics
        plans, slow = self._split(program, ctx, allotment)
        left |= {
            site.weight: "the budget is best spent on it"
            for site in sites
            if site.weight not in left and not any(site in plan.sites for plan in plans)
        }
        diagnostics += [*told(plans), *slow, *left_alone(left)]
        details = {"layer_profile": profile(sites, allotment.options, plans)}
        return PassResult(bool(plans), statistics(sites, plans), diagnostics, details=details)

    @property
    def _wanted(self) -> Wanted:
        form: Form = "matrix" if self.convolutions == "channel" else self.convolutions
        every = self.among or get_args(Method)
        kernels: tuple[Form, ...] = ("spatial", "tucker", "cp")
        forms = tuple(name for name in kernels if name in every)
        return Wanted(
            where=self.name,
            method=self.method,
            among=every,
            forms=("matrix", *forms) if self.method == "mixed" else (form,),
            budget=self.budget,
            share=self.share,
            rank=self.rank,
            joint=self.joint,
            damping=self.damping,
            weigh=self.weigh,
            remainder=self.remainder,
        )

    def _plain(self, sites: Sequence[Site], metrics: Metrics) -> Iterator[Diagnostic]:
        """A warning about sites whose data the method could not see."""
        if self.method == "svd":
            return
        known = metrics.inputs.keys() | metrics.rows.keys()
        unseen = [site.weight for site in sites if site not in known]
        if unseen:
            text = f"split by plain singular values, for want of data: {listed(unseen)}"
            yield Diagnostic("warning", text)

    def _split(
        self, program: Program, ctx: PassContext, allotment: Allotment
    ) -> tuple[list[Plan], list[Diagnostic]]:
        """Write the factors of each plan; what is told of those that are slower."""
        plans, made = allotment.plans, allotment.made
        table = table_for(program) if self.time and plans else None
        before: dict[Site, float] = {}
        if table is not None:
            ctx.report("measuring layers")
            before = seconds_of([s for plan in plans for s in plan.sites], program, table)
        done = []
        with program.edit(by=ctx.spec) as edit:
            for number, plan in enumerate(plans):
                ctx.report(f"splitting {plan.sites[0].weight} ({number + 1}/{len(plans)})")
                factors = made.pop(plan, None) or make_any(
                    plan, program, allotment.metrics, self.damping, ctx.seed
                )
                calls = write_any(edit, plan, factors)
                done.append((replace(plan, error=factors.error), calls))
        found = [plan for plan, _ in done]
        if table is None:
            return found, []
        ctx.report("measuring split layers")
        return found, list(slower(program, done, before, table))
