"""What layers read on the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torchlathe.ir import Error, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import info
from torchlathe.passes.rewrite.factorising.sites import Site
from torchlathe.passes.rewrite.sweeping.sweep import naming

__all__ = ["operands_of", "run_reading"]


def operands_of(sites: Iterable[Site]) -> dict[fx.Node, str]:
    """Each floating value that layers read, with the parameter of the first of these."""
    found: dict[fx.Node, str] = {}
    for site in sites:
        # Rows behind those of the last expert are nobody's, and may be anything.
        for call in site.calls if site.kind != "experts" else ():
            data = site.operand(call)
            if data.meta["val"].is_floating_point():
                found.setdefault(data, site.weight)
    return found


def run_reading(
    program: Program,
    flat: Sequence[Any],
    read: Mapping[fx.Node, str],
    see: Callable[[fx.Node, Tensor], None] | None = None,
) -> list[Any]:
    """Run one batch, and look at what layers read.

    Args:
        program: What to run.
        flat: Its inputs.
        read: Values, with the parameter of what reads each.
        see: Called with each of them, inputs and tensors of the model among them.

    Returns:
        The flat outputs.

    Raises:
        InputError: One of them is not finite.
    """

    def observe(node: fx.Node, value: Any) -> None:
        if node not in read:
            return
        with naming(read[node], "quantised"):
            ends = value.aminmax() if value.numel() else ()
            if not all(bool(torch.isfinite(end)) for end in ends):
                raise Error("the data that a layer reads has values that are not finite")
        if see is not None:
            see(node, value)

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node, value in zip(program.input_nodes, flat, strict=True):
            observe(node, value)
        for node in read:
            if (name := info(node).tensor) is not None:
                observe(node, program.tensor(name).detach())
        return run_flat(program, flat, observe=observe)
