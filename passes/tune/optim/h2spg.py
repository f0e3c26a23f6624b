"""H2SPG: whole branches of a network become zero, as many as leave it a network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchlathe.ir import InputError, OptionError
from torchlathe.passes.analysis.branches import Branch
from torchlathe.passes.analysis.segments import SegmentGraph
from torchlathe.passes.rewrite.branches.choice import Aim, choose_branches
from torchlathe.passes.rewrite.branches.leave_out import zeroed_by
from torchlathe.passes.rewrite.branches.liveness import Liveness
from torchlathe.passes.tune.optim.groups import Sums, named_tensors
from torchlathe.passes.tune.optim.hesso import left_after
from torchlathe.passes.tune.optim.saliency import Saliency, saliency_of
from torchlathe.passes.tune.optim.shards import Meshes, all_reduced, local, shard_of
from torchlathe.passes.tune.optim.sparse_optimizer import (
    WrappedOptimizer,
    check_schedule,
    rates_of,
    trainable,
)

__all__ = ["H2SPG", "removable"]


@dataclass(frozen=True)
class _Slice:
    """What is zero in one tensor without a branch.

    Attributes:
        tensor: The live one.
        axis: One of its axes.
        indices: Of the axis, as far as this process has them.
        meshes: Process groups over which parts of the tensor are spread.
    """

    tensor: torch.Tensor
    axis: int
    indices: torch.Tensor
    meshes: Meshes

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The slice of values in the shape of the tensor's local part."""
        return values.index_select(self.axis, self.indices.to(values.device))

    def multiply(self, factor: float) -> None:
        """In place."""
        mine = local(self.tensor)
        mine.index_copy_(self.axis, self.indices.to(mine.device), self.of(mine) * factor)


def removable(graph: SegmentGraph, exclude: Sequence[str]) -> tuple[Branch, ...]:
    """Branches that a network can do without.

    Args:
        graph: Of the network.
        exclude: Names of those that stay.

    Raises:
        OptionError: There is none, or none of that name.
    """
    known = {b.name for b in graph.branches}
    for name in exclude:
        if name not in known:
            raise OptionError(f"there is no branch {name}", where="H2SPG")
    found = tuple(
        b for b in graph.branches if not b.reason and not b.constant and b.name not in exclude
    )
    if not found:
        raise OptionError(
            "the network has no branch that it can do without",
            where="H2SPG",
            hint="torchlathe inspect MODEL --segments tells why each has to stay",
        )
    return found


class H2SPG(WrappedOptimizer):
    """Hierarchical half-space projected gradient (OTOv3): erases operators instead of channels.

    After ``start_step`` steps of the base, one step scores every branch that the network can do
    without. They are taken in the order of their scores, each if what is left is still a network
    (every joint keeps an operand, every output a path), until the target share of the parameters
    would be gone, with all that nothing else needs then. Those branches go to zero in
    ``pruning_steps`` along a line. ``erase-operators{zeros=true}`` then cuts them out exactly.

    Args:
        groups: ``tl.capture(model, inputs).analysis(Segments)``.
        model: The module that was captured, or tensors by name.
        base: Class of the optimizer that trains.
        params: As in `SparseOptimizer`.
        target_sparsity: Share of the model's parameters to be rid of, in (0, 1).
        start_step: Steps of the base alone.
        pruning_steps: Steps of the decay.
        total_steps: Of the whole training, if known.
        saliency: As in `SparseOptimizer`, of all parameters that a branch zeroes.
        exclude: Names of branches that stay.
        options: For the base.

    Attributes:
        chosen: The branches that become zero, once they are known.

    Raises:
        OptionError: An option is out of its range, or there is no branch that may go.
        InputError: The segments are of another model.

    Source: arXiv 2312.09411; the optimizer was never published, so this is a reconstruction: the
    hierarchical search by `choose_branches`, and HESSO's decay in place of the projection.
    """

    def __init__(
        self,
        groups: SegmentGraph,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        params: Any = None,
        target_sparsity: float = 0.5,
        start_step: int = 0,
        pruning_steps: int = 1,
        total_steps: int | None = None,
        saliency: Saliency | Mapping[str, float] | str = "default",
        exclude: Sequence[str] = (),
        **options: Any,
    ) -> None:
        check_schedule("H2SPG", target_sparsity, start_step, pruning_steps, total_steps)
        self.graph, self.program = groups, groups.flow.program
        self.saliency = saliency_of(saliency)
        self.target_sparsity = target_sparsity
        self.start_step, self.pruning_steps = start_step, pruning_steps
        tensors = named_tensors(model)
        self._candidates = removable(groups, exclude)
        self._slices = {b.name: self._of(b, tensors) for b in self._candidates}
        self.steps = 0
        self.chosen: tuple[str, ...] = ()
        if params is None:
            params = trainable(model, tensors)
        super().__init__(params, base, options)

    def _of(self, branch: Branch, tensors: Mapping[str, torch.Tensor]) -> list[_Slice]:
        """What is zero without a branch."""
        found = []
        for name, axes in zeroed_by(self.program, [branch]).slices.items():
            tensor = tensors.get(name)
            want = self.program.entries[name].tensor.shape
            if tensor is None or tensor.shape != want:
                raise InputError(
                    f"{name} has shape {tuple(want)} in the segments, but "
                    f"{'is missing' if tensor is None else tuple(tensor.shape)} in the model",
                    hint="give the model that was captured",
                )
            shard = shard_of(tensor, name)
            for axis, indices in axes.items():
                if shard.dim == axis:
                    mine = (indices >= shard.start) & (indices < shard.stop)
                    indices = indices[mine] - shard.start
                found.append(_Slice(tensor, axis, indices, shard.meshes))
        return found

    # -- stepping ----------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether no more branches become zero."""
        return self.steps >= self.start_step + self.pruning_steps

    def step(self, closure: Any = None, *, loss: Any = None) -> Any:
        """One step of the base, and of the decay."""
        if self._only_makes_state():
            return self._base_step(closure)
        now = self.steps - self.start_step
        before = self._remember() if now == 0 else None
        result = self._base_step(closure)
        if before is not None:
            self._choose(before)
        if now >= 0:
            past = now >= self.pruning_steps
            self._multiply(0.0 if past else left_after(now, self.pruning_steps))
        self.steps += 1
        return result

    @torch.no_grad()
    def _remember(self) -> dict[int, torch.Tensor]:
        slices = itertools.chain.from_iterable(self._slices.values())
        return {id(part.tensor): local(part.tensor).clone() for part in slices}

    @torch.no_grad()
    def _sums(self, before: Mapping[int, torch.Tensor]) -> Sums:
        """Of each branch, over all processes."""
        rates = rates_of(self.param_groups)
        found: dict[Meshes, torch.Tensor] = {}
        for row, branch in enumerate(self._candidates):
            for part in self._slices[branch.name]:
                x = part.of(before[id(part.tensor)]).double()
                d = x - part.of(local(part.tensor)).double()
                d /= rates.get(id(part.tensor)) or math.inf
                sums = torch.stack([(x * x).sum(), (x * d).sum(), (d * d).sum()]).cpu()
                total = found.setdefault(part.meshes, sums.new_zeros(4, len(self._candidates)))
                total[:3, row] += sums
                total[3, row] += x.numel()
        totals = [all_reduced(total, meshes) for meshes, total in found.items()]
        return Sums(*torch.stack(totals).sum(0))

    def _choose(self, before: Mapping[int, torch.Tensor]) -> None:
        scores = self.saliency.scores(self._sums(before))
        by_branch = dict(zip(self._candidates, scores.tolist(), strict=True))
        sizes = sum(t.numel() for t in self.program.parameters.values())
        aim = Aim("parameters", self.target_sparsity * sizes)
        liveness = Liveness(self.program, self.graph)
        choose_branches(liveness, by_branch, aim)
        self.chosen = tuple(b.name for b in liveness.effective if b.name in self._slices)

    @torch.no_grad()
    def _multiply(self, factor: float) -> None:
        for name in self.chosen:
            for part in self._slices[name]:
                part.multiply(factor)

    # -- state -------------------------------------------------------------------------------

    def sparse_state(self) -> dict[str, Any]:
        """Steps done, and the branches that were chosen."""
        return {"steps": self.steps, "chosen": list(self.chosen)}

    def _take(self, state: Mapping[str, Any]) -> None:
        if unknown := [name for name in state["chosen"] if name not in self._slices]:
            raise InputError(f"the state names a branch {unknown[0]}, which this model has not")
        self.steps = int(state["steps"])
        self.chosen = tuple(state["chosen"])
