"""How much each branch matters: what the outputs, the loss or its weights say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import fx

from torchlathe.ir import InputError, OptionError, PreconditionError, Program, info
from torchlathe.ir.fakes import valueless
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.analysis.branches import Branch
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.branches.leave_out import zeroed_by
from torchlathe.passes.rewrite.erasing.shrink import ZeroedSlices
from torchlathe.passes.statistics.gradients import stream_gradients
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["CRITERIA", "FEW", "BranchImportance", "branch_scores", "resolved"]

BranchImportance: TypeAlias = str | Callable[[Branch, Program], float] | Mapping[str, float]

CRITERIA = ("auto", "output-change", "magnitude", "taylor", "random")
# So many branches are measured by default: each costs about half a run of the model.
FEW = 64
# Above this, values are computed again instead of kept.
_KEEP_BYTES = 2 << 30


def resolved(importance: BranchImportance, branches: Sequence[Branch]) -> BranchImportance:
    """The criterion that "auto" stands for."""
    if importance != "auto":
        return importance
    return "output-change" if len(branches) <= FEW else "magnitude"


def branch_scores(
    program: Program,
    branches: Sequence[Branch],
    importance: BranchImportance,
    ctx: PassContext,
) -> dict[Branch, float]:
    """A score for each branch; the lowest are erased first, infinite ones never.

    Args:
        program: Where the tensors are.
        branches: What may be left out.
        importance: "output-change": relative change of the outputs without the branch, the mean
            over the calibration batches (or for the example inputs); "taylor": first-order
            estimate ``|sum w g|`` of how the loss changes; "magnitude": mean square of the
            parameters that die; "random"; a function of (branch, program); or given scores, by
            the name of the branch or segment.
        ctx: Data, loss and seed.

    Raises:
        OptionError: An unknown criterion, or a score that is missing or no number.
        PreconditionError: Data, the loss or the values of parameters are missing.
        InputError: A score is NaN.
    """
    if importance in ("output-change", "magnitude", "taylor"):
        _need_values(program, str(importance))
    if importance == "output-change":
        found = _output_change(program, branches, ctx)
    elif importance == "taylor":
        found = _taylor(program, branches, ctx)
    elif importance == "magnitude":
        found = {branch: _mean_square(program, branch) for branch in branches}
    elif importance == "random":
        generator = torch.Generator().manual_seed(ctx.seed)
        drawn = torch.rand(len(branches), generator=generator).tolist()
        found = dict(zip(branches, drawn, strict=True))
    else:
        found = {branch: _given(importance, branch, program) for branch in branches}
    for branch, score in found.items():
        if math.isnan(score):
            raise InputError(
                f"the importance of {branch.name} is NaN", hint="look for what made it diverge"
            )
    return found


def _need_values(program: Program, importance: str) -> None:
    empty = next((n for n, tensor in program.parameters.items() if valueless(tensor)), None)
    if empty is not None:
        raise PreconditionError(
            f"importance={importance} asks for values, but {empty} has none: the model is on the "
            "meta device, or fake",
            hint="importance=random, or scores of your own, need no values",
        )


def _given(importance: Any, branch: Branch, program: Program) -> float:
    if isinstance(importance, Mapping):
        names = [name for name in (branch.name, branch.segment) if name in importance]
        if not names:
            raise OptionError(
                f"no score was given for {branch.name}",
                hint="give one for each branch that may be erased, or exclude it",
            )
        score = importance[names[0]]
    else:
        score = importance(branch, program)
    try:
        return float(score)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"the score of {branch.name} is no number but {type(score).__name__}"
        ) from error


# -- weights and gradients -------------------------------------------------------------------------


def _mean_square(program: Program, branch: Branch) -> float:
    total = 0.0
    for name in branch.parameters:
        tensor = program.entries[name].tensor.detach()
        total += float(torch.linalg.vector_norm(tensor, dtype=torch.float64).square())
    return total / branch.parameter_count


def _taylor(program: Program, branches: Sequence[Branch], ctx: PassContext) -> dict[Branch, float]:
    """``|sum w g|`` over what is zeroed, the mean over batches.

    Source: arXiv 1906.10771, equation 8, without the square, summed over a branch.
    """
    slices = {branch: zeroed_by(program, [branch]) for branch in branches}
    names = {name for zeroed in slices.values() for name in zeroed.slices}
    total = dict.fromkeys(branches, 0.0)
    count = 0
    for gradients in stream_gradients(program, ctx, names):
        count += 1
        for branch, zeroed in slices.items():
            change = 0.0
            for name in zeroed.slices:
                if name in gradients.values:
                    tensor = program.entries[name].tensor.detach()
                    less = (tensor - zeroed(name, tensor)).double()
                    change += float((less * gradients.values[name]).sum())
            total[branch] += abs(change)
    return {branch: value / max(1, count) for branch, value in total.items()}


# -- outputs ---------------------------------------------------------------------------------------


def _output_change(
    program: Program, branches: Sequence[Branch], ctx: PassContext
) -> dict[Branch, float]:
    total = dict.fromkeys(branches, 0.0)
    count = 0
    slices = {branch: zeroed_by(program, [branch]) for branch in branches}
    for _, flat in flat_batches(program, ctx):
        count += 1
        replay = _Replay(program, flat)
        for number, branch in enumerate(branches, 1):
            ctx.report(f"batch {count}: without branch {number} of {len(branches)}")
            total[branch] += replay.change(branch, slices[branch])
    return {branch: value / max(1, count) for branch, value in total.items()}


class _Replay:
    """Runs what comes after a branch again, on the values of one run of the whole."""

    def __init__(self, program: Program, flat: Sequence[Any]) -> None:
        self.program = program
        self.flat = flat
        self.values: dict[fx.Node, Any] | None = None
        if _activation_bytes(program) <= _KEEP_BYTES:
            self.values = dict(zip(program.input_nodes, flat, strict=True))
        with torch.no_grad():
            self.outputs = run_flat(program, flat, observe=self._keep)

    def _keep(self, node: fx.Node, value: Any) -> None:
        if self.values is not None:
            self.values[node] = value

    def change(self, branch: Branch, zeroed: ZeroedSlices) -> float:
        """Distance of the outputs without the branch from those with it, over their norm."""
        with torch.no_grad():
            if self.values is None:
                outputs = run_flat(self.program, self.flat, replace_tensor=zeroed)
            else:
                outputs = self._again(branch, zeroed)
        apart = whole = 0.0
        for want, got in zip(self.outputs, outputs, strict=True):
            if isinstance(want, torch.Tensor) and want.is_floating_point():
                apart += float((want.double() - got.double()).square().sum())
                whole += float(want.double().square().sum())
        return math.sqrt(apart / whole) if whole else math.sqrt(apart)

    def _again(self, branch: Branch, zeroed: ZeroedSlices) -> list[Any]:
        before = self.values
        assert before is not None
        dead = set(branch.nodes)
        held = before[branch.exit]
        changed: dict[fx.Node, Any] = {branch.exit: torch.full_like(held, branch.constant or 0.0)}
        tensors = self.program.tensor_nodes
        changed |= {
            tensors[name]: zeroed(name, self.program.entries[name].tensor) for name in zeroed.slices
        }

        def fetch(node: fx.Node) -> Any:
            if node in changed:
                return changed[node]
            name = info(node).tensor
            return before[node] if name is None else self.program.entries[name].tensor

        for node in self.program.graph.nodes:
            if node.op == "output":
                return list(fx.map_arg(node.args[0], fetch))
            again = node.op == "call_function" and node not in dead
            if again and any(used in changed for used in node.all_input_nodes):
                args, kwargs = fx.map_arg((node.args, node.kwargs), fetch)
                changed[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph without an output")


def _activation_bytes(program: Program) -> float:
    try:
        return float(program.cost().at().activation_bytes)
    except InputError:  # an extent that the data decides
        return math.inf
