"""Statistics of routing over calibration data: who is used how much, and with whom.

One run over the batches; per layer only counts and second moments stay.

Source: usage and the similarity of router logits of MC-SMoE (arXiv 2310.01334) after its public
code (``mcsmoe/merging``); the saliency of REAP (arXiv 2510.13999), a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.experts import ExpertLayer, ExpertRead
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["RoutingStatistics", "collect_routing"]

# Between the last read of the experts and the product with the gates.
_LOOKED_THROUGH = frozenset(
    {"squeeze", "unsqueeze", "view", "reshape", "add", "to", "_to_copy", "bmm", "matmul"}
)


@dataclass
class RoutingStatistics:
    """What the router of one layer does on the calibration data.

    Attributes:
        counts: How often each expert was picked; shape (experts,) float64.
        rows: Number of rows that were routed (tokens).
        picks: How often each router output was picked; shape (choices,) float64.
        moments: Sum over rows of products of the router's logits; shape (choices, choices)
            float64.
        outputs: Sum over the rows of each expert of the norm of its gated output; shape
            (experts,) float64. None where the graph does not show it.
        slots: Which expert each router output leads to; shape (choices,) int64.
    """

    counts: torch.Tensor
    picks: torch.Tensor
    moments: torch.Tensor
    slots: torch.Tensor
    outputs: torch.Tensor | None = None
    rows: int = 0

    @classmethod
    def of(cls, program: Program, layer: ExpertLayer) -> RoutingStatistics:
        """Empty sums for a layer."""
        return cls(
            counts=torch.zeros(layer.experts, dtype=torch.float64),
            picks=torch.zeros(layer.choices, dtype=torch.float64),
            moments=torch.zeros(layer.choices, layer.choices, dtype=torch.float64),
            slots=layer.slots(program),
        )

    @property
    def usage(self) -> torch.Tensor:
        """Share of the picks that each expert got; sums to 1. Shape (experts,) float64."""
        return self.counts / self.counts.sum().clamp_min(1)

    @property
    def similarity(self) -> torch.Tensor:
        """``(cos + 1) / 2`` of the experts' router logits over all rows; shape (experts, experts).

        An expert that several router outputs lead to has the sum of the logits of those that are
        ever picked: others may be forbidden, and lead anywhere.
        """
        experts = len(self.counts)
        members = torch.zeros(experts, len(self.slots), dtype=torch.float64)
        members[self.slots, torch.arange(len(self.slots))] = 1
        picked = members * (self.picks > 0)
        members = torch.where(picked.any(1, keepdim=True), picked, members)
        moments = members @ self.moments @ members.T
        norms = moments.diagonal().clamp_min(0).sqrt()
        scale = (norms[:, None] * norms[None, :]).clamp_min(torch.finfo(torch.float64).tiny)
        return ((moments / scale).clamp(-1, 1) + 1) / 2

    @property
    def saliency(self) -> torch.Tensor | None:
        """Mean norm of each expert's gated output over the rows that picked it (REAP, eq. 9)."""
        return None if self.outputs is None else self.outputs / self.counts.clamp_min(1)


@dataclass
class _Observer:
    """Adds up one layer while a program runs."""

    layer: ExpertLayer
    sums: RoutingStatistics
    last: ExpertRead | None
    gated: fx.Node | None
    _row_numbers: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, program: Program, layer: ExpertLayer) -> _Observer:
        """With empty sums."""
        last, gated = _gated(layer)
        return cls(layer, RoutingStatistics.of(program, layer), last, gated)

    def watch(self) -> list[tuple[fx.Node, Callable[[torch.Tensor], None]]]:
        """What to call with the values of which nodes."""
        found: list[tuple[fx.Node, Callable[[torch.Tensor], None]]] = [
            (self.layer.assigned, self._count),
            (self.layer.chosen, self._pick),
            (self.layer.logits, self._multiply),
        ]
        if self.last is not None and self.gated is not None:
            found += [(self.last.by, self._keep), (self.gated, self._measure)]
        return found

    def _count(self, value: torch.Tensor) -> None:
        picked = value.flatten().cpu().long()
        self.sums.counts += torch.bincount(picked, minlength=self.layer.experts).double()
        self.sums.rows += len(picked) // self.layer.top_k

    def _pick(self, value: torch.Tensor) -> None:
        picked = value.flatten().cpu().long()
        self.sums.picks += torch.bincount(picked, minlength=self.layer.choices).double()

    def _multiply(self, value: torch.Tensor) -> None:
        rows = value.detach().reshape(-1, value.shape[-1]).double()
        self.sums.moments += (rows.T @ rows).cpu()

    def _keep(self, value: torch.Tensor) -> None:
        assert self.last is not None
        if self.last.grouped:
            ends = value.cpu().long()
            counts = torch.diff(ends, prepend=ends.new_zeros(1))
            self._row_numbers = torch.arange(len(ends)).repeat_interleave(counts)
        else:
            self._row_numbers = value.flatten().cpu().long()

    def _measure(self, value: torch.Tensor) -> None:
        numbers = self._row_numbers
        assert numbers is not None
        norms = value.detach().reshape(len(numbers), -1).double().norm(dim=1).cpu()
        if self.sums.outputs is None:
            self.sums.outputs = torch.zeros_like(self.sums.counts)
        self.sums.outputs.index_add_(0, numbers, norms)


def collect_routing(
    program: Program, ctx: PassContext, layers: Iterable[ExpertLayer]
) -> dict[ExpertLayer, RoutingStatistics]:
    """Run the program over the calibration batches and sum up what the routers do.

    Args:
        program: What to run, without gradients.
        ctx: The batches (or example inputs), and where progress goes.
        layers: Of this program.

    Returns:
        Per layer its statistics, on the CPU.

    Raises:
        InputError: A batch does not fit the program, or there is none.
        PreconditionError: The program has no values to compute with.
    """
    observers = [_Observer.of(program, layer) for layer in layers]
    watched: dict[fx.Node, list[Callable[[torch.Tensor], None]]] = {}
    for observer in observers:
        for node, action in observer.watch():
            watched.setdefault(node, []).append(action)

    def observe(node: fx.Node, value: Any) -> None:
        for action in watched.get(node, ()):
            action(value)

    for index, (_, flat) in enumerate(flat_batches(program, ctx)):
        ctx.report(f"statistics of routing: batch {index + 1}")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run_flat(program, flat, observe=observe)
    return {observer.layer: observer.sums for observer in observers}


def _gated(layer: ExpertLayer) -> tuple[ExpertRead | None, fx.Node | None]:
    """The last matrix of the experts that is read, and the product of what it gives with the gates.

    The second is None where the graph has another form.
    """
    matrices = [r for r in layer.reads if r.grouped or r.node.meta["val"].dim() >= 3]
    if not matrices:
        return None, None
    last = matrices[-1]
    node = last.node
    for _ in range(8):  # at most a bias, casts and views
        users = [user for user in node.users if op_name(user) in {*_LOOKED_THROUGH, "mul"}]
        if len(users) != 1:
            break
        node = users[0]
        if op_name(node) == "mul":
            # Sorted rows are one axis; picked ones may have their own.
            return last, node if not last.grouped or node.meta["val"].dim() == 2 else None
    return last, None
