"""Leave experts out of mixture-of-experts layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from torchlathe.ir import PreconditionError, Program
from torchlathe.passes.analysis.experts import ExpertLayer, ExpertLayers
from torchlathe.passes.analysis.routing import RoutingStatistics, collect_routing
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.experts.grouping import budgets, kept_experts, total_experts
from torchlathe.passes.rewrite.experts.reporting import EXPERTS_HELP, check_count, routing_numbers
from torchlathe.passes.rewrite.experts.routers import leave_out
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.statistics.running import need_data

__all__ = ["PruneExperts"]


@dataclass(frozen=True)
class PruneExperts(RewritePass):
    """Leaves out the experts that matter least; their rows go to the next best.

    Keeps: the outputs of the model in which the router can never choose the experts that are left
    out. Changes: their weights go, and their rows of the router.

    Source: pruning by usage is the baseline of MC-SMoE (arXiv 2310.01334); ``by=reap`` is the
    saliency of REAP (arXiv 2510.13999), a reconstruction, ranked per layer or over all.
    """

    name: ClassVar[str] = "prune-experts"
    requires: ClassVar = (ExpertLayers,)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    experts: float = field(default=0.5, metadata={"help": EXPERTS_HELP})
    by: Literal["usage", "outputs", "reap"] = field(
        default="usage",
        metadata={
            "help": "what makes an expert matter: how often it is picked; the norms of its gated "
            "outputs, summed over the rows; or their mean over the rows that pick it"
        },
    )
    allocation: Literal["global", "uniform"] = field(
        default="global",
        metadata={
            "help": "rank the shares that experts have in their layer over the whole model; or "
            "keep the same share of each layer"
        },
    )
    router: Literal["rows", "mask"] = field(
        default="rows",
        metadata={
            "help": "take the rows of the router away; or keep them, and forbid them by a mask "
            "(also where rows cannot go)"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: Not even one expert is to stay.
        """
        super().__post_init__()
        check_count(self.experts, self.name)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Count, rank, and leave out.

        Raises:
            PreconditionError: There are no layers of experts, fewer experts than asked for, or
                fewer asked for than a row picks.
            InputError: A batch does not fit the program.
        """
        layers = ctx.analysis(ExpertLayers).need(self.name)
        total = total_experts(self.experts, [x.experts for x in layers], where=self.name)
        floors = [layer.top_k for layer in layers]
        if total < sum(floors):
            raise PreconditionError(
                f"experts={self.experts:g} keeps {total} experts in {len(layers)} layers, but rows "
                f"pick {', '.join(map(str, floors))}",
                where=self.name,
                hint="keep at least as many as a row picks, or merge experts, which may leave one",
            )
        need_data(ctx, "which experts matter depends on it")
        routing = collect_routing(program, ctx, layers)
        told: list[Diagnostic] = []
        scores = [self._scores(layer, routing[layer], told) for layer in layers]
        counts = budgets(scores, total, allocation=self.allocation, floors=floors)
        kept: dict[ExpertLayer, torch.Tensor] = {}
        for layer, each, count in zip(layers, scores, counts, strict=True):
            if count < layer.experts:
                kept[layer] = kept_experts(each, count)
                told.append(_note(layer, kept[layer], each))
        leave_out(program, kept, rows=self.router == "rows", by=ctx.spec, told=told)
        return PassResult(bool(kept), routing_numbers(layers, counts, routing), told)

    def _scores(
        self, layer: ExpertLayer, routing: RoutingStatistics, told: list[Diagnostic]
    ) -> torch.Tensor:
        """Shares of the layer, so that layers can be compared; shape (experts,) float64."""
        found = {"usage": routing.usage, "outputs": routing.outputs, "reap": routing.saliency}
        saliency = found[self.by]
        if saliency is None:
            text = "the gated outputs of its experts were not found, so usage stands for them"
            told.append(Diagnostic("warning", text, name=layer.name))
            saliency = routing.usage
        return saliency / saliency.sum().clamp_min(torch.finfo(saliency.dtype).tiny)


def _note(layer: ExpertLayer, kept: torch.Tensor, scores: torch.Tensor) -> Diagnostic:
    gone = [e for e in range(layer.experts) if e not in kept.tolist()]
    lost = f"{float(scores[gone].sum()):.1%} of all scores"
    text = f"left out {', '.join(map(str, gone))} of {layer.experts} experts, with {lost}"
    return Diagnostic("note", text, name=layer.name)
