"""The norms in which layers are split: second moments of inputs, and weights of rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.factorising.products import Moment, Wide
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.statistics import (
    collect_gradients,
    collect_layers,
    readers_of,
)
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.running import flat_batches, need_data

__all__ = ["Metrics", "collect_metrics"]


@dataclass
class Metrics:
    """What is known of the data at each site; a site that is in none has the plain norm.

    Attributes:
        inputs: Mean of ``x x'`` over the rows of the data, (groups, ins, ins).
        means: Mean of ``x``, (groups, ins), of sites whose bias can take up what a split changes
            of the mean of the outputs; there the norm is that of the covariance.
        rows: Weight of each row of the matrix, (outs of all groups,), with a mean of one.
        effects: How much the relative squared error of a site counts; 1 where absent.
    """

    inputs: Mapping[Site, torch.Tensor] = field(default_factory=dict)
    means: Mapping[Site, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[Site, torch.Tensor] = field(default_factory=dict)
    effects: Mapping[Site, float] = field(default_factory=dict)

    def effect(self, *sites: Site) -> float:
        """Of errors in all of these sites, in sum."""
        return sum(self.effects.get(site, 1.0) for site in sites)

    def moment(self, sites: Sequence[Site], group: int = 0) -> torch.Tensor | None:
        """Of what these sites read, for one group: centred where every one has a bias."""
        found = self.norm(sites, group)
        return found.dense() if isinstance(found, Moment) else found

    def norm(self, sites: Sequence[Site], group: int = 0) -> torch.Tensor | Moment | None:
        """As `moment`, where possible without a matrix of its own."""
        first = sites[0]
        if first not in self.inputs:
            return None
        centred = all(site in self.means for site in sites)
        mean = self.means[first][group] if centred else None
        if isinstance(self.inputs, _Seconds):
            return self.inputs.moment(first, group, mean)
        second = self.inputs[first][group]
        return second if mean is None else torch.addr(second, mean, mean, alpha=-1)

    def weights(self, site: Site, group: int) -> torch.Tensor | None:
        """Of the rows of one group."""
        rows = self.rows.get(site)
        return None if rows is None else rows.reshape(site.groups, site.outs)[group]

    def shift(
        self,
        sites: Sequence[Site],
        index: int,
        before: torch.Tensor,
        after: Sequence[tuple[torch.Tensor, ...]],
    ) -> torch.Tensor | None:
        """What the bias of a site has to take up: the change of its mean output.

        Args:
            sites: Those that are split together.
            index: Which of them.
            before: Its matrices, (groups, outs, ins).
            after: Per group the matrix in its place, as factors ``(a, b, ...)`` of ``a @ b``.

        Returns:
            Shape (groups x outs,), float64; None where nothing can take it up.
        """
        site = sites[index]
        if not all(each in self.means for each in sites):
            return None
        found = []
        for mean, old, new in zip(self.means[site], before, after, strict=True):
            *rest, last = new
            value = last.double() @ mean
            for factor in reversed(rest):
                value = factor.double() @ value
            found.append(Wide(old).of(mean[:, None])[:, 0] - value)
        return torch.cat(found)


def collect_metrics(
    program: Program, ctx: PassContext, sites: Iterable[Site], method: str
) -> Metrics:
    """Run the program over the data as a method needs it.

    Args:
        program: The program.
        ctx: The batches, and the loss for the Fisher information.
        sites: What is to be split.
        method: ``"svd"`` needs nothing.

    Raises:
        PreconditionError: The Fisher information is asked for without a loss.
    """
    chosen = list(sites)
    if method == "svd":
        return Metrics()
    if method == "fisher-weighted":
        return Metrics(rows=_fisher(program, ctx, chosen))
    need_data(ctx, "layers are split so that their outputs on it stay what they are")
    inputs, means = _moments(program, ctx, chosen)
    return Metrics(inputs, means, _usage(program, ctx, chosen))


class _Seconds(Mapping[Site, torch.Tensor]):
    """Second moments by site, each made when it is asked for.

    Sums of products may be in memory-mapped files: only one matrix at a time is in memory.
    """

    def __init__(self, moments: Mapping[Site, Sequence[Moments]]) -> None:
        self._moments = moments

    def moment(self, site: Site, group: int, mean: torch.Tensor | None) -> Moment:
        """That of one group, less the product of a mean."""
        parts = self._moments[site]
        count = max(1, sum(part.count for part in parts))
        sums = tuple(part.products[group] for part in parts if part.products is not None)
        return Moment(sums, count, mean)

    def __getitem__(self, site: Site) -> torch.Tensor:
        groups = range(site.groups)
        return torch.stack([self.moment(site, group, None).dense() for group in groups])

    def __contains__(self, site: object) -> bool:
        return site in self._moments  # the default makes the matrix to tell

    def __iter__(self) -> Iterator[Site]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)


def _moments(
    program: Program, ctx: PassContext, sites: list[Site]
) -> tuple[Mapping[Site, torch.Tensor], dict[Site, torch.Tensor]]:
    """Second moments and means of what sites read; those that no reader covers are left out."""
    known = readers_of(program)
    plain = [site for site in sites if site.kind != "embedding"]
    wanted = [known[call] for site in plain for call in site.calls if call in known]
    if not wanted:
        return {}, {}
    layers = collect_layers(program, ctx, wanted)
    moments: dict[Site, list[Moments]] = {}
    means: dict[Site, torch.Tensor] = {}
    for site in plain:
        parts = [layers[call].inputs for call in site.calls if call in layers]
        if len(parts) != len(site.calls):
            continue
        count = sum(part.count for part in parts)
        if any(p.products is None for p in parts):
            continue
        shapes = {tuple(p.products.shape) for p in parts if p.products is not None}
        if shapes != {(site.groups, site.ins, site.ins)}:
            continue
        moments[site] = parts
        if site.biased:
            means[site] = _sum_of([part.total for part in parts]) / count
    return _Seconds(moments), means


def _sum_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def _fisher(program: Program, ctx: PassContext, sites: list[Site]) -> dict[Site, torch.Tensor]:
    """Sums over each row of the empirical Fisher information (arXiv 2207.00112, equation 6)."""
    gradients = collect_gradients(program, ctx, [site.weight for site in sites])
    found = {}
    for site in sites:
        moments = gradients.get(site.weight)
        if moments is None:
            continue
        rows = site.matrices(moments.squares.double()).sum(2).flatten()
        if float(rows.sum()) > 0:
            found[site] = rows / rows.mean()
    return found


def _usage(program: Program, ctx: PassContext, sites: list[Site]) -> dict[Site, torch.Tensor]:
    """How often each row of an embedding is looked up, plus one for those that never are."""
    tables = [
        s for s in sites if all(c.target is torch.ops.aten.embedding.default for c in s.calls)
    ]
    if not tables:
        return {}
    counts = {site: torch.ones(site.outs, dtype=torch.float64) for site in tables}
    watched: dict[fx.Node, list[Site]] = {}
    for site in tables:
        for call in site.calls:
            watched.setdefault(site.operand(call), []).append(site)

    def observe(node: fx.Node, value: Any) -> None:
        for site in watched.get(node, ()):
            counts[site] += torch.bincount(value.flatten().cpu(), minlength=site.outs)

    places = {node: i for i, node in enumerate(program.input_nodes)}
    for index, (_, flat) in enumerate(flat_batches(program, ctx)):
        ctx.report(f"rows of embeddings that are used: batch {index + 1}")
        for node in watched.keys() & places.keys():
            observe(node, flat[places[node]])
        if watched.keys() - places.keys():
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                run_flat(program, flat, observe=observe)
    device = program.tensor(tables[0].weight).device
    return {site: (rows / rows.mean()).to(device) for site, rows in counts.items()}
