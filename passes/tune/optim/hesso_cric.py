"""HESSO-CRIC: groups are tried out before they go, so that none goes that the model depends on.

Corrective redundancy identification cycles: a saliency seen from where the groups still are says
little about those that the loss depends on in full. So what looks redundant is taken to zero for a
while, the saliency of everything is followed on the way, and all is put back; what then looks
redundant in its place is tried as well, until nothing new does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from torchlathe.ir import InputError, OptionError, PreconditionError
from torchlathe.passes.analysis.families import Families
from torchlathe.passes.tune.optim.groups import named_tensors
from torchlathe.passes.tune.optim.hesso import left_after
from torchlathe.passes.tune.optim.shards import like
from torchlathe.passes.tune.optim.sparse_optimizer import (
    GONE,
    KEPT,
    LEAVING,
    Memory,
    SparseOptimizer,
)

__all__ = ["HESSOCRIC"]

Stage = Literal["wait", "probe", "cycle", "decay", "done"]

# Shares of each family that are zeroed to see what the loss does.
PROBES = (0.25, 0.5, 0.75)


class HESSOCRIC(SparseOptimizer):
    """HESSO with corrective cycles: ``step(loss=...)`` has to be given the loss of the batch.

    After ``start_step`` steps of the base:

    1. Probe: one step for each family and share of `PROBES`, with that share of its units at zero.
       Nothing is trained; the loss over the one before says how much the family can lose.
    2. Cycles of ``sampling_steps``: the candidates decay to zero while the base trains, and the
       saliency of all groups is collected. At the end all weights (and buffers) are put back, and
       the groups that looked redundant in the cycle and were never tried are the next candidates;
       none left, or ``max_cycles``, is the end.
    3. The groups of the lowest mean saliency (with the probes' losses) go to zero in
       ``pruning_steps``, as in HESSO.

    Keeps a copy of all weights and buffers until then. The state of the base is not put back.

    Args:
        groups: See `SparseOptimizer`, as for all that is not here.
        model: The module.
        pruning_steps: Steps of the last decay.
        sampling_steps: Steps of a cycle.
        max_cycles: Most cycles.
        tolerance: Candidates that are few enough not to be tried.
        loss_weight: Of the probes' losses beside the criteria of the saliency.
        total_steps: Steps of the whole training, if known; all the cycles have to fit in.
        options: Of `SparseOptimizer`, and of the base.

    Source: HESSO-CRIC, arXiv 2409.09085, and its code. Of a concatenation only the slices of the
    candidates decay; how losses of a family become a saliency of its groups is a reconstruction.
    """

    def __init__(
        self,
        groups: Families,
        model: nn.Module | Mapping[str, torch.Tensor],
        *,
        pruning_steps: int = 1,
        sampling_steps: int = 10,
        max_cycles: int = 10,
        tolerance: int = 0,
        loss_weight: float = 0.2,
        total_steps: int | None = None,
        **options: Any,
    ) -> None:
        if sampling_steps < 1 or max_cycles < 1 or tolerance < 0 or loss_weight < 0:
            raise OptionError(
                f"sampling_steps={sampling_steps}, max_cycles={max_cycles}, tolerance={tolerance} "
                f"and loss_weight={loss_weight}: the first two must be at least 1, the others 0",
                where="HESSOCRIC",
            )
        super().__init__(groups, model, pruning_steps=pruning_steps, **options)
        self.sampling_steps, self.max_cycles = sampling_steps, max_cycles
        self.tolerance, self.loss_weight = tolerance, loss_weight
        self._all = self._changing(named_tensors(model))
        self._check_length(total_steps)
        count = self.table.count
        self.stage: Stage = "wait"
        self.cycles = 0
        self._at = 0  # step within the stage, or the cycle
        self._reference = 0.0
        self._saved: dict[str, torch.Tensor] = {}
        self._first = torch.zeros(count, dtype=torch.float64)
        self._ratios = torch.zeros(count, dtype=torch.float64)
        self._tried = torch.zeros(count, dtype=torch.float64)
        self._total = torch.zeros(count, dtype=torch.float64)
        self._samples = 0
        self._candidates = torch.zeros(count, dtype=torch.bool)
        self._known = torch.zeros(count, dtype=torch.bool)

    def _changing(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What probes and cycles may change: all but frozen parameters that no group owns."""
        owned = {id(place.tensor) for place in self.table.places}
        return {
            name: tensor
            for name, tensor in tensors.items()
            if tensor.is_floating_point()
            and (
                not isinstance(tensor, nn.Parameter) or tensor.requires_grad or id(tensor) in owned
            )
        }

    def _check_length(self, total: int | None) -> None:
        probes = 1 + len(PROBES) * len(self.table.chosen)
        most = probes + self.max_cycles * self.sampling_steps
        end = self.start_step + most + self.pruning_steps
        if total is not None and end > total:
            raise OptionError(
                f"probes and cycles take up to {most} steps, so pruning may end after step {end}, "
                f"but the training has {total}",
                where="HESSOCRIC",
                hint="fewer sampling_steps, max_cycles or pruning_steps",
            )

    def schedule(self) -> dict[str, int]:
        """When groups go."""
        own = {"sampling_steps": self.sampling_steps, "max_cycles": self.max_cycles}
        return super().schedule() | own

    @property
    def decays(self) -> bool:
        """Whether it is known which groups go, and they do."""
        return self.stage == "decay"

    @property
    def finished(self) -> bool:
        """Whether no more groups become zero."""
        return self.stage == "done"

    # -- stepping ----------------------------------------------------------------------------

    # A gradient scaler leaves out steps whose gradients overflow; those of a probe may do so each
    # time, and it would never end. So overflows are this optimizer's to look at.
    _step_supports_amp_scaling = True

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: torch.Tensor | float | None = None,
    ) -> Any:
        """One step, as of `SparseOptimizer`; the loss has to be known."""
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if overflow is not None and bool(overflow):
            if self.stage != "probe":
                return None
        elif scale is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(1 / float(scale))
        return super().step(closure, loss=loss)

    def _base_step(self, closure: Any) -> Any:
        if self.stage == "probe":
            # The gradients are those of a model with holes in it.
            return None if closure is None else closure()
        return super()._base_step(closure)

    def _before(self) -> Memory | None:
        begins = self.stage == "wait" and self.steps >= self.start_step
        return self._remember() if begins or self.stage == "cycle" else None

    def _after(self, before: Memory | None, loss: Any) -> None:
        if self.stage == "wait":
            if before is not None:
                self._begin(before, loss)
        elif self.stage == "probe":
            self._probed(loss)
        elif self.stage == "cycle":
            assert before is not None
            self._cycle(before)
        elif self.stage == "decay":
            self._decay()
        else:
            self._multiply()

    def _begin(self, before: Memory, loss: Any) -> None:
        self._reference = self._loss(loss)
        self._first = self.saliency.scores(self._sums(before))
        self._saved = {name: t.detach().clone() for name, t in self._all.items()}
        self.stage, self._at = "probe", 0
        self._zero_share()

    # -- probes ------------------------------------------------------------------------------

    def _probed_groups(self) -> torch.Tensor:
        """The groups that the present probe zeroes; shape (groups,) bool."""
        family, share = divmod(self._at, len(PROBES))
        mine = (self.table.family == family).nonzero().flatten()
        order = mine[torch.argsort(self._first[mine], stable=True)]
        found = torch.zeros_like(self._known)
        found[order[: int(len(mine) * PROBES[share])]] = True
        return found

    def _zero_share(self) -> None:
        self._set_phase(self._probed_groups(), LEAVING)
        self._multiply(0.0)
        self.phase.zero_()

    def _probed(self, loss: Any) -> None:
        """The loss was that of a model in which a share of a family is zero."""
        zeroed = self._probed_groups()
        ratio = min(1e3, self._loss(loss) / max(self._reference, 1e-12))
        ratio = 1e3 if math.isnan(ratio) else ratio
        family = self._at // len(PROBES)
        mine = self.table.family == family
        # What no probe zeroed is at least as dear as the dearest.
        self._ratios[zeroed] += ratio
        self._tried[zeroed] += 1
        last = self._at % len(PROBES) == len(PROBES) - 1
        if last:
            untried = mine & (self._tried == 0)
            self._ratios[untried] = ratio
            self._tried[untried] = 1
        self._restore()
        self._at += 1
        if self._at < len(PROBES) * len(self.table.chosen):
            self._zero_share()
            return
        self._start_cycle(self._lowest(self._first, self.target, torch.zeros_like(self._known)))

    def _loss(self, loss: Any) -> float:
        if loss is None:
            raise PreconditionError(
                "HESSOCRIC looks at the loss of its first steps, but step() was given none",
                hint="call step(loss=loss); with a gradient scaler, "
                "scaler.step(optimizer, loss=loss)",
            )
        value = torch.as_tensor(loss, dtype=torch.float64).detach().cpu().reshape(())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = next(iter(self._all.values())).device
            shared = value.to(device)
            torch.distributed.all_reduce(shared)
            value = shared.cpu() / torch.distributed.get_world_size()
        return float(value)

    # -- cycles ------------------------------------------------------------------------------

    def _start_cycle(self, candidates: torch.Tensor) -> None:
        self.stage, self._at = "cycle", 0
        self.cycles += 1
        self._known |= candidates
        self._candidates = torch.zeros_like(candidates)
        self._set_phase(candidates, LEAVING)

    def _cycle(self, before: Memory) -> None:
        scores = self.saliency.scores(self._sums(before))
        self._total += scores
        self._samples += 1
        looks = self._lowest(scores, self.target, torch.zeros_like(self._known))
        self._candidates |= looks & ~self._known
        self._multiply(left_after(self._at, self.sampling_steps))
        self._at += 1
        if self._at < self.sampling_steps:
            return
        self._restore()
        if self.cycles < self.max_cycles and int(self._candidates.sum()) > self.tolerance:
            self._start_cycle(self._candidates)
        else:
            self._choose()

    def _choose(self) -> None:
        """The groups that go for good."""
        extents = torch.tensor([f.extent for f in self.table.chosen], dtype=torch.float64)
        losses = self._ratios / self._tried.clamp_min(1) / extents[self.table.family]
        scores = self._total / max(1, self._samples)
        scores = scores + self.loss_weight * losses / (losses.norm() + 1e-8)
        self._set_phase(self._lowest(scores, self.target, torch.zeros_like(self._known)), LEAVING)
        self._saved = {}
        self.stage, self._at = "decay", 0

    def _decay(self) -> None:
        self._multiply(left_after(self._at, self.pruning_steps))
        self._at += 1
        if self._at == self.pruning_steps:
            self._set_phase(self.phase == LEAVING, GONE)
            self.stage = "done"

    @torch.no_grad()
    def _restore(self) -> None:
        self.phase.fill_(KEPT)
        for name, value in self._saved.items():
            self._all[name].copy_(value)

    # -- state -------------------------------------------------------------------------------

    def sparse_state(self) -> dict[str, Any]:
        """All that the probes and cycles have found, and the weights that they go back to."""
        own: dict[str, Any] = {name: getattr(self, name) for name in self._KEPT_STATE}
        own = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in own.items()}
        saved = {name: value.clone() for name, value in self._saved.items()}
        return super().sparse_state() | own | {"saved": saved}

    def _take(self, state: Mapping[str, Any]) -> None:
        if unknown := [name for name in state["saved"] if name not in self._all]:
            raise InputError(
                f"the state has the weights of {unknown[0]}, which no cycle of this model changes",
                hint="load it into the model that it was saved with, with the same parameters "
                "frozen",
            )
        super()._take(state)
        for name in self._KEPT_STATE:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, torch.Tensor) else value)
        self._saved = {
            name: like(value, self._all[name]).clone() for name, value in state["saved"].items()
        }

    _KEPT_STATE = (
        "stage", "cycles", "_at", "_reference", "_first", "_ratios", "_tried", "_total",
        "_samples", "_candidates", "_known",
    )  # fmt: skip
