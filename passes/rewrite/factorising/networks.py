"""Tensor trains and Kronecker sums as plans for a site, next to products of two factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import fx

from torchlathe.ir import Edit, Program
from torchlathe.passes.rewrite.factorising.making import Factors, make
from torchlathe.passes.rewrite.factorising.metrics import Metrics
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.factorising.writing import write
from torchlathe.passes.rewrite.tensor_networks.plans import (
    NetworkKind,
    network_cores,
    network_error,
    network_plans,
)
from torchlathe.passes.rewrite.tensor_networks.trains import dense
from torchlathe.passes.rewrite.tensor_networks.writing import can_write, write_network

__all__ = ["Networks", "blank_cores", "make_any", "plans_of_networks", "write_any"]

Networks: TypeAlias = Callable[[Site, NetworkKind, Program, Metrics, float], Iterable[Plan]]


def plans_of_networks(
    site: Site,
    kind: NetworkKind,
    program: Program,
    metrics: Metrics,
    damping: float,
) -> Iterator[Plan]:
    """Plans over a grid of bonds, each with its error in the norm of the outputs.

    Args:
        site: The layer; one that cannot be a network has none.
        kind: Of network.
        program: Where the weights are.
        metrics: The norm that errors are told in.
        damping: As `make_any` gets it.
    """
    if can_write(site) is not None:
        return
    matrix = site.matrices(program.tensor(site.weight).detach())[0]
    moment = metrics.moment([site])
    for found in network_plans(matrix, moment, kinds=(kind,), damping=damping):
        method = "svd" if moment is None else "whitened-svd"
        yield Plan(
            (site,),
            method,
            "network",
            found.bonds,
            found.parameters,
            found.error,
            network=found,
        )


def make_any(plan: Plan, program: Program, metrics: Metrics, damping: float, seed: int) -> Factors:
    """The tensors of a plan of any form: as `make`, with the cores of networks as the own ones."""
    if plan.network is None:
        return make(plan, program, metrics, damping, seed)
    (site,) = plan.sites
    matrices = site.matrices(program.tensor(site.weight).detach())
    moment = metrics.moment([site])
    cores = network_cores(plan.network, matrices[0], moment, damping=damping, seed=seed)
    error = network_error(cores, matrices[0], moment)
    shift = metrics.shift([site], 0, matrices, [(dense(cores),)])
    return Factors((), tuple(cores), (shift,), error)


def write_any(edit: Edit, plan: Plan, factors: Factors) -> list[fx.Node]:
    """Let every call of the plan's sites use its factors.

    Returns:
        The calls that the graph has for it now.
    """
    before = set(edit.program.graph.nodes)
    if plan.network is None:
        write(edit, plan, factors)
    else:
        write_network(edit, plan.sites[0], plan.network, factors.own, factors.shifts[0])
    added = (node for node in edit.program.graph.nodes if node not in before)
    return [node for node in added if node.op == "call_function"]


def blank_cores(plan: Plan, program: Program) -> Factors:
    """Cores of a network with zeros in them."""
    assert plan.network is not None
    like = program.tensor(plan.sites[0].weight)
    bonds = (1, *plan.network.bonds, 1)
    modes = zip(plan.network.out_modes, plan.network.in_modes, strict=True)
    cores = [
        torch.zeros(bonds[k], out, inner, bonds[k + 1], dtype=like.dtype, device=like.device)
        for k, (out, inner) in enumerate(modes)
    ]
    return Factors((), tuple(cores), (None,), 0.0)
