"""Moments of the values of nodes, over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.running import flat_batches

__all__ = ["Watch", "collect_moments"]


@dataclass(frozen=True, eq=False)
class Watch:
    """What to collect of one node's value.

    Attributes:
        node: The node.
        rows: From its value to (groups, samples, extent).
        extent: Number of features, to tell the memory for the matrix; groups count as one each.
        matrix: Whether to collect second moments, besides sums and sums of squares.
    """

    node: fx.Node
    rows: Callable[[torch.Tensor], torch.Tensor]
    extent: int
    matrix: bool = False

    @classmethod
    def axis(cls, node: fx.Node, axis: int, *, matrix: bool = False) -> Watch:
        """The indices of one axis as features, and all else as samples."""

        def rows(value: torch.Tensor) -> torch.Tensor:
            return value.movedim(axis, -1).reshape(1, -1, value.shape[axis])

        return cls(node, rows, int(node.meta["val"].shape[axis]), matrix)


def collect_moments(
    program: Program,
    ctx: PassContext,
    watches: Iterable[Watch],
    *,
    dtype: torch.dtype | None = None,
    limit_bytes: int = 2**31,
) -> dict[Watch, Moments]:
    """Run the program over the calibration batches and sum up what is watched.

    One pass over the data, or several where the matrices that are asked for do not fit together
    into ``limit_bytes``. The values themselves are gone after each batch.

    Args:
        program: What to run, without gradients.
        ctx: The batches (or example inputs) and where progress goes.
        watches: What to sum up; a value that is watched twice is computed once.
        dtype: Run in this floating dtype; by default as the program is.
        limit_bytes: Memory for the matrices of one sweep, in bytes.

    Returns:
        Moments of each watch, on the device of the program.

    Raises:
        InputError: A batch does not fit the program, or there is none.
    """
    found: dict[Watch, Moments] = {}
    sweeps = _sweeps(list(watches), limit_bytes)
    for number, sweep in enumerate(sweeps):
        by_node: dict[fx.Node, list[Watch]] = {}
        for watch in sweep:
            found[watch] = Moments(matrix=watch.matrix)
            by_node.setdefault(watch.node, []).append(watch)

        def observe(
            node: fx.Node, value: object, by_node: dict[fx.Node, list[Watch]] = by_node
        ) -> None:
            for watch in by_node.get(node, ()):
                assert isinstance(value, torch.Tensor)
                found[watch].add(watch.rows(value))

        inputs = {node: i for i, node in enumerate(program.input_nodes)}
        for index, (_, flat) in enumerate(flat_batches(program, ctx)):
            sweep_text = f", sweep {number + 1}/{len(sweeps)}" if len(sweeps) > 1 else ""
            ctx.report(f"statistics of activations: batch {index + 1}{sweep_text}")
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for node in by_node.keys() & inputs.keys():
                    observe(node, flat[inputs[node]])
                run_flat(program, flat, dtype=dtype, observe=observe)
    return found


def _sweeps(watches: list[Watch], limit_bytes: int) -> list[list[Watch]]:
    """Watches in the order given, as many at a time as fit; at least one."""
    sweeps: list[list[Watch]] = []
    used = 0
    for watch in watches:
        size = 8 * watch.extent**2 if watch.matrix else 16 * watch.extent
        if not sweeps or used + size > limit_bytes:
            sweeps.append([])
            used = 0
        sweeps[-1].append(watch)
        used += size
    return sweeps
