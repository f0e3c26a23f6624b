"""Erase whole branches: blocks, attention, sub-networks, lowest importance first."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchlathe.ir import InputError, OptionError, Program, module_path
from torchlathe.passes.analysis.branches import Branch
from torchlathe.passes.analysis.segments import SegmentGraph, Segments
from torchlathe.passes.base import Diagnostic, Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.quantities import COUNT, Quantity, quantity
from torchlathe.passes.rewrite.branches.choice import Aim, Chosen, choose_branches, per_cost
from torchlathe.passes.rewrite.branches.leave_out import erase_branches, zeroed_by
from torchlathe.passes.rewrite.branches.liveness import Liveness
from torchlathe.passes.rewrite.branches.scores import CRITERIA, branch_scores, resolved
from torchlathe.passes.rewrite.quantising.facts import Unpacked

__all__ = ["EraseOperators"]


@dataclass(frozen=True)
class EraseOperators(RewritePass):
    """Erases the branches that matter least, and all that nothing else needs then.

    Keeps: the outputs of the model in which the parameters of the erased segments are zero
    (exactly). Changes: calls and parameters go; what a concatenation loses, its readers lose too.

    Source: the erasing mode of OTOv3 (arXiv 2312.09411), a reconstruction; see `Segments`.
    """

    name: ClassVar[str] = "erase-operators"
    requires: ClassVar = (Segments,)
    exactness: ClassVar[Exactness] = Exactness.EXACT
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    sparsity: float | None = field(
        default=None, metadata={"help": "share of the model's parameters to erase, in [0, 1)"}
    )
    params: float | str | None = field(
        default=None,
        metadata={
            "help": "parameters of the whole model to keep: a share up to 1, or a count such as 20M"
        },
    )
    flops: float | str | None = field(
        default=None,
        metadata={
            "help": "FLOPs at the sizes of the example inputs to keep: a share up to 1, or a count "
            "such as 1.5G"
        },
    )
    count: int | None = field(
        default=None,
        metadata={"help": "branches to erase; 1 unless something else says how much"},
    )
    importance: str | Callable[..., float] | dict[str, float] = field(
        default="auto",
        metadata={
            "help": "output-change, magnitude, taylor or random; auto is the first for up to 64 "
            "branches, else the second; from Python also a callable (branch, program) -> score, "
            "or a dict of scores by name"
        },
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={"help": "erase only these: patterns of branches, segments, tensors or modules"},
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={"help": "leave these alone: patterns of branches, segments, tensors or modules"},
    )
    keep_at_least: float = field(
        default=0, metadata={"help": "branches to keep: a count, or a share if below 1"}
    )
    constants: bool = field(
        default=False,
        metadata={"help": "also erase what holds another constant than zero, and keep that"},
    )
    zeros: bool = field(
        default=False,
        metadata={"help": "erase just the branches that training made zero, as H2SPG does"},
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: More than one option says how much, or one is out of its range.
        """
        super().__post_init__()
        how_much = [n for n in ("sparsity", "params", "flops", "count") if self._given(n)]
        if self.zeros and (how_much or self.keep_at_least):
            name = [*how_much, "keep_at_least"][0]
            raise OptionError(
                f"{name} does not go with zeros, which erases just what is zero", where=self.name
            )
        if len(how_much) > 1:
            raise OptionError(
                f"{' and '.join(how_much)} all say how much to erase",
                where=self.name,
                hint="give one of them",
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise OptionError(
                f"sparsity is {self.sparsity}, but must be in [0, 1)",
                where=self.name,
                hint="it is the share that is erased: 0.25 leaves three quarters",
            )
        if self.count is not None and self.count < 1:
            raise OptionError(f"count is {self.count}, but must be at least 1", where=self.name)
        least = self.keep_at_least
        if not least >= 0 or (least >= 1 and least % 1 != 0):
            raise OptionError(
                f"keep_at_least is {least}, but must be a share between 0 and 1, or a whole number",
                where=self.name,
            )
        for name in ("params", "flops"):
            if self._given(name):
                self._quantity(name)
        if isinstance(self.importance, str) and self.importance not in CRITERIA:
            raise OptionError(
                f"importance={self.importance!r} is not known",
                where=self.name,
                hint=f"{did_you_mean(self.importance, CRITERIA)} From Python also a callable or a "
                "dict of scores",
            )

    def _given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _quantity(self, name: str) -> Quantity:
        return quantity(getattr(self, name), COUNT, name=name, where=self.name)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Score the branches, choose, leave them out, and say what had to stay."""
        graph = ctx.analysis(Segments)
        branches, diagnostics = self._candidates(program, graph)
        statistics: dict[str, int | float | str] = {
            "segments": len(graph),
            "removable": len(graph.removable),
            "candidates": len(branches),
        }
        if not branches:
            diagnostics.append(Diagnostic("warning", "there is no branch that may be erased"))
            return PassResult(False, statistics, diagnostics)
        if self.zeros:
            branches = [branch for branch in branches if _is_zero(program, branch)]
        aim = self._aim(program) if not self.zeros else Aim("count", len(branches))
        importance: Any = "zeros" if self.zeros else resolved(self.importance, branches)
        scores = (
            dict.fromkeys(branches, 0.0)
            if self.zeros
            else branch_scores(program, branches, importance, ctx)
        )
        liveness = Liveness(program, graph, _flops(program))
        ranks = scores
        if importance in ("output-change", "taylor") and aim.measure != "count":
            ranks = per_cost(scores, liveness, aim, branches)
        least = self.keep_at_least
        keep = int(least) if least >= 1 else math.ceil(least * len(branches))
        chosen = choose_branches(liveness, ranks, aim, keep)
        statistics |= {
            "importance": importance if isinstance(importance, str) else "given",
            "erased_branches": len(chosen.branches),
            "erased_parameters": liveness.parameters,
        }
        diagnostics += [] if self.zeros else _told(chosen, scores, aim)
        if not chosen.branches:
            return PassResult(False, statistics, diagnostics)
        reference = erase_branches(program, chosen.branches, by=ctx.spec)
        return PassResult(True, statistics, diagnostics, reference=reference)

    def _aim(self, program: Program) -> Aim:
        parameters = sum(tensor.numel() for tensor in program.parameters.values())
        if self.sparsity is not None:
            return Aim("parameters", self.sparsity * parameters)
        if self.params is not None:
            kept = self._quantity("params").of(parameters)
            return Aim("parameters", parameters - kept, reach=True)
        if self.flops is not None:
            flops = program.cost().flops_at()
            return Aim("flops", flops - self._quantity("flops").of(flops), reach=True)
        return Aim("count", self.count or 1)

    # -- which branches ------------------------------------------------------------------------

    def _candidates(
        self, program: Program, graph: SegmentGraph
    ) -> tuple[list[Branch], list[Diagnostic]]:
        chosen: list[Branch] = []
        diagnostics = []
        names = {branch: set(_names(branch)) for branch in graph.branches}
        for pattern in (*self.include, *self.exclude):
            if not any(fnmatch.filter(found, pattern) for found in names.values()):
                known = ", ".join(b.name for b in graph.branches[:5])
                raise OptionError(
                    f"the pattern {pattern!r} matches no branch, segment, tensor or module",
                    where=self.name,
                    hint=f"branches are {known}, ..." if known else "there is none",
                )
        for branch in graph.branches:
            found = names[branch]
            if self.include and not any(fnmatch.filter(found, p) for p in self.include):
                continue
            if any(fnmatch.filter(found, p) for p in self.exclude):
                continue
            reason = branch.reason
            if not reason and branch.constant and not self.constants:
                reason = (
                    f"it holds {branch.constant:g} when its parameters are zero; constants=true "
                    "puts that in its place"
                )
            fixed = next((name for name in branch.parameters if name in program.frozen), None)
            if not reason and fixed is not None:
                reason = f"a constant was computed from {fixed} before"
            if not reason:
                chosen.append(branch)
            elif self.include:
                text = f"left alone, since {reason}"
                diagnostics.append(Diagnostic("note", text, name=branch.name))
        return chosen, diagnostics


def _is_zero(program: Program, branch: Branch) -> bool:
    """Whether all is zero that is zero in the model that is equal without a branch."""
    slices = zeroed_by(program, [branch]).slices
    for name, axes in slices.items():
        tensor = program.entries[name].tensor.detach()
        for axis, indices in axes.items():
            if tensor.index_select(axis, indices.to(tensor.device)).any():
                return False
    return bool(slices)


def _names(branch: Branch) -> Iterator[str]:
    """What a pattern may match: the branch, its segment, what it owns, and modules it is in."""
    yield branch.name
    yield branch.segment
    yield from branch.parameters
    for path in {module_path(node) for node in branch.nodes}:
        parts = path.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _flops(program: Program) -> Mapping[str, int]:
    try:
        cost = program.cost().at()
    except InputError:  # an extent that the data decides
        return {}
    return {name: int(spent.flops) for name, spent in cost.nodes.items()}


def _told(chosen: Chosen, scores: Mapping[Branch, float], aim: Aim) -> Sequence[Diagnostic]:
    told = [
        Diagnostic(
            "note",
            f"erased with a score of {scores[branch]:.3g}: {branch.parameter_count:,} parameters",
            name=branch.name,
        )
        for branch in chosen.branches
    ]
    told += [
        Diagnostic("note", f"had to stay, since {reason}", name=branch.name)
        for branch, reason in chosen.refused.items()
        if reason != "it is gone already"
    ]
    short = aim.amount - chosen.erased
    if not chosen.branches and aim.amount > 0 and not aim.reach and aim.measure != "count":
        told.append(Diagnostic("warning", "every branch is larger than what is to be erased"))
    elif short > 0 and (aim.reach or aim.measure == "count" or short > 0.1 * aim.amount):
        what = "branches" if aim.measure == "count" else aim.measure
        told.append(
            Diagnostic(
                "warning",
                f"asked to erase {aim.amount:,.0f} {what}, but only {chosen.erased:,.0f} can go",
            )
        )
    return told
