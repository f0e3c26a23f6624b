"""Layers as products of two smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.allocation.budgets import budgets
from torchlathe.passes.rewrite.factorising.allotting import Wanted, allot, uniform
from torchlathe.passes.rewrite.factorising.metrics import Metrics, collect_metrics
from torchlathe.passes.rewrite.factorising.plans import Form, Plan, make
from torchlathe.passes.rewrite.factorising.sensitivity import Effects, output_weights
from torchlathe.passes.rewrite.factorising.sites import Site, chosen_sites, find_sites
from torchlathe.passes.rewrite.factorising.writing import write

__all__ = ["LowRankSplit", "Sources"]

Budget = float | str | None


@dataclass(frozen=True)
class Sources:
    """Where a split has its statistics from.

    Attributes:
        metrics: Collects what a method needs to know of the data.
        effects: Measures what errors in each layer do to the outputs.
    """

    metrics: Callable[[Program, PassContext, Sequence[Site], str], Metrics] = collect_metrics
    effects: Effects = output_weights


def _help(what: str, amounts: str) -> dict[str, str]:
    return {"help": f"{what} of the whole model to keep: a share up to 1, or {amounts}"}


@dataclass(frozen=True)
class LowRankSplit(RewritePass):
    """Splits linear layers, convolutions and embeddings into two or three smaller ones.

    Keeps: shapes and calls of everything else; biases stay on the last factor. Changes: each split
    parameter becomes a ``down`` and an ``up`` with a rank axis between them, which later passes see
    as any other free axis. A layer is only split where that makes it smaller.

    Source: see `torchlathe.passes.rewrite.factorising.splits`.
    """

    name: ClassVar[str] = "low-rank-split"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    method: Literal["svd", "whitened-svd", "fisher-weighted", "mixed"] = field(
        default="whitened-svd",
        metadata={
            "help": "the norm in which a split is best: of the weight, of the outputs on the "
            "calibration data, or of the weight with rows weighted by the Fisher information; "
            "mixed chooses for each layer among dense, svd, whitened, joint and the forms of "
            "convolutions"
        },
    )
    share: float | None = field(
        default=None,
        metadata={
            "help": "share of the parameters of the layers that it may split to keep; 0.5 unless "
            "something else says how much"
        },
    )
    params: Budget = field(default=None, metadata=_help("parameters", "a count such as 20M"))
    bytes: Budget = field(default=None, metadata=_help("bytes of tensors", "a size such as 40MB"))
    flops: Budget = field(
        default=None,
        metadata=_help("FLOPs at the sizes of the example inputs", "a count such as 1.5G"),
    )
    rank: int | None = field(default=None, metadata={"help": "the same rank for every layer"})
    allocation: Literal["auto", "uniform", "greedy", "exact"] = field(
        default="auto",
        metadata={
            "help": "how the budget is shared out: the same share for each layer, by equal slope "
            "of the errors, or by integer programming; auto is exact for up to 512 layers, else "
            "greedy, and uniform where a rank is given"
        },
    )
    weigh: Literal["output", "layer"] = field(
        default="output",
        metadata={
            "help": "what an allocation keeps small: the error of each layer times its effect on "
            "the outputs, measured by splitting it alone, or the error of each layer as it is"
        },
    )
    joint: bool = field(
        default=False,
        metadata={
            "help": "layers that read the same input share the factor that reads it, such as "
            "queries, keys and values; mixed decides that itself"
        },
    )
    convolutions: Literal["channel", "spatial", "tucker"] = field(
        default="channel",
        metadata={
            "help": "form of convolutions: few channels and then 1x1, kx1 and then 1xk, or 1x1, a "
            "small kernel, 1x1; mixed decides that itself"
        },
    )
    embeddings: bool = field(default=False, metadata={"help": "split embeddings too"})
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "split only these: patterns of tensors or modules"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors or modules"}
    )
    damping: float = field(
        default=1e-6,
        metadata={
            "help": "how much directions that the calibration data never shows count, relative to "
            "the mean direction"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: More than one option says how much, one is out of its range, or they
                contradict one another.
        """
        super().__post_init__()
        amounts = ("share", "params", "bytes", "flops", "rank")
        given = [name for name in amounts if getattr(self, name) is not None]
        if len(given) > 1:
            raise self._refused(f"{' and '.join(given)} all say how much to keep", "give one")
        if self.share is not None and not 0 < self.share < 1:
            raise self._refused(
                f"share is {self.share}, but must be between 0 and 1", "0.5 keeps half"
            )
        if self.rank is not None and self.rank < 1:
            raise self._refused(f"rank is {self.rank}, but must be at least 1")
        if not 0 <= self.damping <= 1:
            raise self._refused(f"damping is {self.damping}, but must be between 0 and 1")
        budgets({n: getattr(self, n) for n in ("params", "bytes", "flops")}, self.name)
        if self.rank is not None and self.allocation not in ("auto", "uniform"):
            raise self._refused(
                f"rank says the same for every layer, and allocation={self.allocation} chooses",
                "give share or params instead of rank",
            )
        if self.method == "mixed" and (self.rank is not None or self.allocation == "uniform"):
            raise self._refused(
                "method=mixed chooses for each layer, so that neither rank nor "
                "allocation=uniform goes with it"
            )

    def _refused(self, message: str, hint: str | None = None) -> OptionError:
        return OptionError(message, where=self.name, hint=hint)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights, or no loss where one is needed.
        """
        if reason := cannot_run(program):
            raise PreconditionError(
                f"{self.name} needs the values of the weights: {reason}",
                hint="capture the model with its weights",
            )
        fisher = self.method == "fisher-weighted"
        if fisher and ctx.loss is None and "loss" not in str(program.out_spec):
            ctx.need("loss", "the Fisher information is made of its gradients")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Collect what the method needs, choose ranks, and split one layer at a time."""
        return self.run_with(program, ctx, Sources())

    def run_with(self, program: Program, ctx: PassContext, sources: Sources) -> PassResult:
        """As `run`, with statistics from elsewhere, for instance from an earlier run."""
        sites, left = chosen_sites(
            *find_sites(program),
            self.include,
            self.exclude,
            embeddings=self.embeddings,
            where=self.name,
        )
        diagnostics: list[Diagnostic] = []
        if not sites:
            diagnostics += [Diagnostic("warning", "there is no layer to split"), *_left_alone(left)]
            return PassResult(False, {"layers": 0}, diagnostics)
        metrics = sources.metrics(program, ctx, sites, self.method)
        diagnostics += self._plain(sites, metrics)
        how = self._allocation(sites)
        if how == "uniform":
            allotment = uniform(self._wanted, program, sites, metrics, left)
        else:
            allotment = allot(self._wanted, program, ctx, sites, metrics, how, sources.effects)
        diagnostics += allotment.diagnostics
        plans = self._split(program, ctx, allotment.plans, allotment.metrics)
        left |= {
            site.weight: "the budget is best spent on it"
            for site in sites
            if site.weight not in left and not any(site in plan.sites for plan in plans)
        }
        diagnostics += [*_told(plans), *_left_alone(left)]
        return PassResult(bool(plans), _statistics(sites, plans), diagnostics)

    def _allocation(self, sites: Sequence[Site]) -> str:
        if self.allocation != "auto":
            return self.allocation
        if self.rank is not None:
            return "uniform"
        return "exact" if len(sites) <= 512 else "greedy"

    @property
    def _wanted(self) -> Wanted:
        amounts = {"params": self.params, "bytes": self.bytes, "flops": self.flops}
        given = [(name, amount) for name, amount in amounts.items() if amount is not None]
        form: Form = "matrix" if self.convolutions == "channel" else self.convolutions
        return Wanted(
            where=self.name,
            method=self.method,
            forms=("matrix", "spatial", "tucker") if self.method == "mixed" else (form,),
            budget=given[0] if given else None,
            share=self.share,
            rank=self.rank,
            joint=self.joint,
            damping=self.damping,
            weigh=self.weigh,
        )

    def _plain(self, sites: Sequence[Site], metrics: Metrics) -> Iterator[Diagnostic]:
        """A warning about sites whose data the method could not see."""
        if self.method == "svd":
            return
        known = metrics.inputs.keys() | metrics.rows.keys()
        unseen = [site.weight for site in sites if site not in known]
        if unseen:
            text = f"split by plain singular values, for want of data: {_listed(unseen)}"
            yield Diagnostic("warning", text)

    def _split(
        self, program: Program, ctx: PassContext, plans: Sequence[Plan], metrics: Metrics
    ) -> list[Plan]:
        done = []
        with program.edit(by=ctx.spec) as edit:
            for number, plan in enumerate(plans):
                ctx.report(f"splitting {plan.sites[0].weight} ({number + 1}/{len(plans)})")
                factors = make(plan, program, metrics, self.damping, ctx.seed)
                write(edit, plan, factors)
                done.append(
                    Plan(
                        plan.sites,
                        plan.method,
                        plan.form,
                        plan.ranks,
                        plan.parameters,
                        factors.error,
                    )
                )
        return done


def _statistics(sites: Sequence[Site], plans: Sequence[Plan]) -> dict[str, int | float | str]:
    split = [site for plan in plans for site in plan.sites]
    before = sum(site.parameters for site in sites)
    after = before - sum(s.parameters for s in split) + sum(plan.parameters for plan in plans)
    errors = [plan.error for plan in plans]
    statistics: dict[str, int | float | str] = {
        "layers": len(sites),
        "split": len(split),
        "joint": sum(len(plan.sites) for plan in plans if len(plan.sites) > 1),
        "parameters_of_layers": before,
        "kept_of_layers": after,
    }
    if errors:
        statistics["mean_error"] = sum(errors) / len(errors)
        statistics["largest_error"] = max(errors)
    return statistics


def _told(plans: Sequence[Plan]) -> Iterator[Diagnostic]:
    """A line for each split: the profile of the layers, in order of execution."""
    for plan in plans:
        whole = sum(site.parameters for site in plan.sites)
        others = f", with {_listed([s.weight for s in plan.sites[1:]])}" if plan.sites[1:] else ""
        form = "" if plan.form == "matrix" else f"{plan.form}, "
        yield Diagnostic(
            "note",
            f"rank {' and '.join(map(str, plan.ranks))} by {form}{plan.method}{others}: "
            f"{plan.parameters / whole:.0%} of its parameters, relative squared error "
            f"{plan.error:.2g}",
            name=plan.sites[0].weight,
        )


def _left_alone(left: Mapping[str, str]) -> Iterator[Diagnostic]:
    """One line for each reason, with the layers."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        yield Diagnostic("note", f"left alone, since {reason}: {_listed(names)}", name=names[0])


def _listed(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
