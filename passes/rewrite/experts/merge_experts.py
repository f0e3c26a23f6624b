"""Merge experts of mixture-of-experts layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from torchlathe.ir import OptionError, Program
from torchlathe.passes.analysis.experts import ExpertLayer, ExpertLayers
from torchlathe.passes.analysis.routing import RoutingStatistics, collect_routing
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.experts.alignment import Alignment, units_of
from torchlathe.passes.rewrite.experts.grouping import (
    Classes,
    budgets,
    clustered_classes,
    led_classes,
    total_experts,
)
from torchlathe.passes.rewrite.experts.merging import (
    Weighting,
    merged_tensors,
    weight_similarity,
)
from torchlathe.passes.rewrite.experts.relabelling import relabel
from torchlathe.passes.rewrite.experts.reporting import (
    EXPERTS_HELP,
    check_count,
    class_text,
    routing_numbers,
)
from torchlathe.passes.rewrite.quantising.facts import Unpacked
from torchlathe.passes.statistics.running import need_data

__all__ = ["MergeExperts"]


@dataclass(frozen=True)
class MergeExperts(RewritePass):
    """Merges experts that a router treats alike into one, weighed by how much they are used.

    Keeps: the router and its choices. Changes: experts of one class are one expert afterwards, the
    mean of its members with their hidden units in one order; a row that picked two of them adds
    both gates to it. Exact where the members of each class compute the same.

    Source: M-SMoE of MC-SMoE (arXiv 2310.01334) after its public code, with gated experts aligned
    too; ties are broken so that the number of experts asked for is met.
    """

    name: ClassVar[str] = "merge-experts"
    requires: ClassVar = (ExpertLayers,)
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    experts: float = field(default=0.5, metadata={"help": EXPERTS_HELP})
    allocation: Literal["global", "uniform"] = field(
        default="global",
        metadata={
            "help": "the most used experts of the whole model lead a class each, at least one per "
            "layer; or the same share of each layer"
        },
    )
    similarity: Literal["router-logits", "weight", "random"] = field(
        default="router-logits",
        metadata={
            "help": "what makes experts alike: logits of the router over all rows, their weights, "
            "or chance (to compare with)"
        },
    )
    grouping: Literal["leaders", "clusters"] = field(
        default="leaders",
        metadata={
            "help": "the most used experts lead a class each and others join them; or classes that "
            "are most alike become one until few enough are left"
        },
    )
    weighting: Weighting = field(
        default="frequency",
        metadata={
            "help": "members count by how often they are picked, all the same, or the least picked "
            "most (to compare with)"
        },
    )
    align: bool = field(
        default=True,
        metadata={"help": "bring the hidden units of merged experts into one order first"},
    )

    balance: bool = field(
        default=False,
        metadata={
            "help": "also bring hidden units to one scale, where what reads them can take it back"
        },
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: Not even one expert is to stay, or units are to be balanced but not
                aligned.
        """
        super().__post_init__()
        check_count(self.experts, self.name)
        if self.balance and not self.align:
            raise OptionError(
                "balance brings units to one scale so that they can be aligned",
                where=self.name,
                hint="leave out align=false",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Count, choose classes, merge, and let the routers lead to the classes.

        Raises:
            PreconditionError: There are no layers of experts, or fewer experts than asked for.
            InputError: A batch does not fit the program.
        """
        layers = ctx.analysis(ExpertLayers).need(self.name)
        extents = [layer.experts for layer in layers]
        total = total_experts(self.experts, extents, where=self.name)
        need_data(ctx, "which experts are used, and how routers tell them apart, depends on it")
        routing = collect_routing(program, ctx, layers)
        usages = [routing[layer].usage for layer in layers]
        counts = budgets(usages, total, allocation=self.allocation, floors=[1] * len(layers))
        classes: dict[ExpertLayer, Classes] = {}
        tensors: dict[str, torch.Tensor] = {}
        told: list[Diagnostic] = []
        for index, (layer, count) in enumerate(zip(layers, counts, strict=True)):
            if count == layer.experts:
                told.append(Diagnostic("note", "all experts stay", name=layer.name))
                continue
            ctx.report(f"merging experts: {layer.name}, {index + 1} of {len(layers)}")
            alignment = self._alignment(program, layer, told)
            usage = routing[layer].usage
            similarity = self._similarity(program, layer, routing[layer], alignment)
            group = led_classes if self.grouping == "leaders" else clustered_classes
            found = classes[layer] = group(similarity, usage, count)
            tensors |= merged_tensors(
                program, layer, found, usage, weighting=self.weighting, alignment=alignment
            )
            told.append(_note(layer, found, usage))
        _apply(program, classes, tensors, ctx.spec)
        return PassResult(bool(classes), routing_numbers(layers, counts, routing), told)

    def _alignment(
        self, program: Program, layer: ExpertLayer, told: list[Diagnostic]
    ) -> Alignment | None:
        if not self.align:
            return None
        if not layer.hidden:
            text = "its experts have no hidden units that can be told apart, so none are aligned"
            told.append(Diagnostic("warning", text, name=layer.name))
            return None
        return units_of(program, layer, balance=self.balance)

    def _similarity(
        self,
        program: Program,
        layer: ExpertLayer,
        routing: RoutingStatistics,
        alignment: Alignment | None,
    ) -> torch.Tensor:
        """How alike experts are; shape (experts, experts)."""
        if self.similarity == "weight":
            return weight_similarity(program, layer, int(routing.usage.argmax()), alignment)
        if self.similarity == "random":
            # The manager seeds torch before each pass, so that runs repeat.
            return torch.rand(layer.experts, layer.experts)
        return routing.similarity


def _note(layer: ExpertLayer, classes: Classes, usage: torch.Tensor) -> Diagnostic:
    shares = ", ".join(f"{share:.1%}" for share in usage.tolist())
    members = class_text(classes.numbers)
    text = f"{layer.experts} experts in {len(classes.leaders)} classes: {members}; used {shares}"
    return Diagnostic("note", text, name=layer.name)


def _apply(
    program: Program,
    classes: Mapping[ExpertLayer, Classes],
    tensors: Mapping[str, torch.Tensor],
    by: str,
) -> None:
    with program.edit(by) as edit:
        for layer, found in classes.items():
            relabel(edit, layer, found.numbers)
            for name, axis in layer.tensors.items():
                # The leader of a class lends its place, and what is there is the mean of all.
                edit.keep(name, {axis: found.leaders})
                edit.set_tensor(name, tensors[name])
