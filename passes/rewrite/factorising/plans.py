"""Ways to split one site, or several that read the same input: what each takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchlathe.passes.rewrite.factorising.conv_splits import tucker_ranks
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.tensor_networks.plans import NetworkPlan

__all__ = ["Form", "Plan", "can_keep_rows", "fits", "most_rank", "plan_of"]

Form = Literal["matrix", "spatial", "tucker", "cp", "network"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to split.

    Attributes:
        sites: What is split; several share the factor that reads their input.
        method: ``"svd"``, ``"whitened-svd"`` or ``"fisher-weighted"``: the norm.
        form: Of a convolution's factors, or ``"network"``; ``"matrix"`` for all else.
        ranks: Channels between the factors, one or two; the bonds of a network.
        parameters: Elements of all factors, and of the rows that are kept.
        error: Squared error over squared norm; the mean over the sites by their effects; NaN if it
            is not known yet.
        kept: Rows of each matrix that are kept as they are.
        network: What the cores of a network are.
    """

    sites: tuple[Site, ...]
    method: str
    form: Form
    ranks: tuple[int, ...]
    parameters: int
    error: float = float("nan")
    kept: int = 0
    network: NetworkPlan | None = None

    @property
    def label(self) -> str:
        """Method and form as one short text: ``tucker``, ``whitened-svd + rows``, ``joint``."""
        if self.network is not None:
            return self.network.kind
        if self.form != "matrix":
            return self.form
        name = "joint" if len(self.sites) > 1 else self.method
        return f"{name} + rows" if self.kept else name

    @property
    def estimated(self) -> bool:
        """Whether a choice is made by an estimate of the error: what is made is measured."""
        return self.kept > 0 or (self.network is not None and self.method != "svd")


def plan_of(
    sites: Sequence[Site],
    method: str,
    form: Form,
    rank: int,
    error: float = float("nan"),
    *,
    kept: int = 0,
) -> Plan | None:
    """The plan of a rank; None where it would not be smaller.

    For ``"tucker"`` the rank is that of a matrix split with as many parameters.
    """
    first = sites[0]
    whole = sum(site.parameters for site in sites)
    ranks: tuple[int, ...] = (rank,)
    if rank < 1:
        return None
    if form == "tucker":
        outs, ins = first.shape[:2]
        positions = math.prod(first.kernel)
        ranks = tucker_ranks(outs, ins, positions, rank * (first.ins + first.outs))
        count = ranks[0] * ins + ranks[0] * ranks[1] * positions + ranks[1] * outs
        if not all(ranks):
            return None
    else:
        count = rank * _each(sites, form, kept) + kept * first.groups * first.ins
    if count >= whole:
        return None
    return Plan(tuple(sites), method, form, ranks, count, error, kept)


def most_rank(sites: Sequence[Site], form: Form = "matrix", *, kept: int = 0) -> int:
    """The largest rank whose plan is smaller than what is there."""
    first = sites[0]
    whole = sum(site.parameters for site in sites) - kept * first.groups * first.ins
    return max((whole - 1) // _each(sites, form, kept), 0)


def _each(sites: Sequence[Site], form: Form, kept: int) -> int:
    """What one more of the rank takes."""
    first = sites[0]
    if form == "spatial":
        outs, ins, tall, wide = first.shape
        return ins * tall + outs * wide
    if form == "cp":
        outs, ins = first.shape[:2]
        return outs + ins + math.prod(first.kernel)
    return first.groups * (first.ins + sum(site.outs for site in sites) - kept)


def fits(site: Site, form: Form) -> bool:
    """Whether a form of convolutions is one for this site; the plain one is for every site."""
    if form == "matrix":
        return True
    kernel = site.kernel
    if site.kind != "convolution" or site.groups > 1 or all(k == 1 for k in kernel):
        return False
    return form != "spatial" or (len(kernel) == 2 and 1 not in kernel)


def can_keep_rows(site: Site) -> bool:
    """Whether some rows of a site may be kept whole.

    Of a grouped convolution, the groups would have to keep as many each; an embedding is read by
    rows, so that it would have to be told which of them are kept at every lookup.
    """
    return site.kind in ("linear", "experts") or (site.kind == "convolution" and site.groups == 1)
