"""Statistics of routing over calibration data: who is used how much, and with whom.

One run over the batches; per layer only counts and second moments stay.

Source: usage and the similarity of router logits of MC-SMoE (arXiv 2310.01334) after its public
code (``mcsmoe/merging``); the saliency of REAP (arXiv 2510.13999), a reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.experts import ExpertLayer, ExpertRead
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import Accumulator, Counts, Moments, Watch, collect

__all__ = ["RoutingStatistics", "collect_routing"]

# Between the last read of the experts and the product with the gates.
_LOOKED_THROUGH = frozenset(
    {"squeeze", "unsqueeze", "view", "reshape", "add", "to", "_to_copy", "bmm", "matmul"}
)


@dataclass(frozen=True)
class RoutingStatistics:
    """What the router of one layer does on the calibration data.

    Attributes:
        counts: How often each expert was picked; shape (experts,) float64.
        picks: How often each router output was picked; shape (choices,) float64.
        moments: Sum over rows of products of the router's logits; shape (choices, choices)
            float64.
        slots: Which expert each router output leads to; shape (choices,) int64.
        rows: Number of rows that were routed (tokens).
        outputs: Sum over the rows of each expert of the norm of its gated output; shape
            (experts,) float64. None where the graph does not show it.
    """

    counts: torch.Tensor
    picks: torch.Tensor
    moments: torch.Tensor
    slots: torch.Tensor
    rows: int
    outputs: torch.Tensor | None = None

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


@dataclass(frozen=True)
class _Watches:
    """What is collected of one layer."""

    counts: Watch
    picks: Watch
    logits: Watch
    outputs: Watch | None

    @classmethod
    def of(cls, layer: ExpertLayer) -> _Watches:
        """Of its assignments, its choice, its logits, and its experts' gated outputs."""
        last, gated = _gated(layer)
        outputs = None
        if last is not None and gated is not None:
            rows = partial(_gated_norms, experts=layer.experts, grouped=last.grouped)
            outputs = Watch(gated, rows, beside=(last.by,))
        return cls(
            Watch.whole(layer.assigned, Counts(layer.experts)),
            Watch.whole(layer.chosen, Counts(layer.choices)),
            Watch.axis(layer.logits, -1, matrix=True),
            outputs,
        )

    def __iter__(self) -> Iterator[Watch]:
        each = (self.counts, self.picks, self.logits, self.outputs)
        return (watch for watch in each if watch is not None)

    def statistics(
        self, found: Mapping[Watch, Accumulator], program: Program, layer: ExpertLayer
    ) -> RoutingStatistics:
        """What the sums say of the layer."""
        counts, picks, logits = (found[w] for w in (self.counts, self.picks, self.logits))
        assert isinstance(counts, Counts)
        assert isinstance(picks, Counts)
        assert isinstance(logits, Moments)
        assert logits.products is not None
        outputs = None if self.outputs is None else found[self.outputs]
        return RoutingStatistics(
            counts=counts.values.double(),
            picks=picks.values.double(),
            moments=logits.products[0].cpu(),
            slots=layer.slots(program),
            rows=counts.count // layer.top_k,
            outputs=outputs.total[0].cpu() if isinstance(outputs, Moments) else None,
        )


def _gated_norms(
    value: torch.Tensor, picked: torch.Tensor, *, experts: int, grouped: bool
) -> torch.Tensor:
    """Sums per expert of the norms of gated outputs; (1, 1, experts).

    Args:
        value: Gated outputs.
        picked: Where the rows of each expert end, if they are sorted; else the expert of each.
        experts: How many there are.
        grouped: Whether rows are sorted.
    """
    if grouped:
        ends = picked.long()
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        numbers = torch.arange(len(ends), device=ends.device).repeat_interleave(counts)
    else:
        numbers = picked.flatten().long()
    norms = value.reshape(len(numbers), -1).double().norm(dim=1)
    total: torch.Tensor = norms.new_zeros(experts).index_add(0, numbers, norms)
    return total[None, None]


def collect_routing(
    program: Program, ctx: PassContext, layers: Iterable[ExpertLayer], **options: Any
) -> dict[ExpertLayer, RoutingStatistics]:
    """Run the program over the calibration batches and sum up what the routers do.

    Args:
        program: What to run, without gradients.
        ctx: The batches (or example inputs), and where progress goes.
        layers: Of this program.
        **options: Those of `statistics.collect`: ``limit_bytes``, ``spill``, ``resume``,
            ``save_every``.

    Returns:
        Per layer its statistics, on the CPU.

    Raises:
        Error: As `statistics.collect` does.
    """
    watched = {layer: _Watches.of(layer) for layer in layers}
    found = collect(program, ctx, [w for each in watched.values() for w in each], **options)
    return {layer: each.statistics(found, program, layer) for layer, each in watched.items()}


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
