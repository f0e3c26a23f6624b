"""Gradients of the loss with respect to parameters, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.accumulators import Total
from torchlathe.passes.statistics.calibration import Calibration
from torchlathe.passes.statistics.losses import check_loss, loss_of
from torchlathe.passes.statistics.running import (
    flat_batches,
    of_how_many,
    usable,
    without_inference,
)
from torchlathe.passes.statistics.storage import MatrixStore
from torchlathe.passes.statistics.streaming import Stream
from torchlathe.passes.statistics.telling import callable_text

__all__ = [
    "GradientMoments",
    "Gradients",
    "collect_gradients",
    "samples_of",
    "stream_gradients",
]


@dataclass(frozen=True)
class Gradients:
    """The gradients of one batch.

    Attributes:
        loss: Value of the loss.
        values: Per parameter, the gradient; parameters that the loss does not depend on have
            none.
    """

    loss: float
    values: Mapping[str, torch.Tensor]


@dataclass
class GradientMoments:
    """Sums over batches of one parameter's gradient, in its shape; float32 or wider.

    Attributes:
        count: Number of batches (of samples, if taken one by one).
        total: Sum of the gradients.
        squares: Sum of their squares: with ``count``, the diagonal of the empirical Fisher.
    """

    count: int
    total: torch.Tensor
    squares: torch.Tensor


def stream_gradients(
    program: Program,
    ctx: PassContext,
    names: Iterable[str] | None = None,
    *,
    per_sample: bool = False,
) -> Iterator[Gradients]:
    """Gradients of each batch in turn; only those of one batch are alive at a time.

    The graph runs node by node under autograd, on copies of no tensor; the caller's parameters
    get no ``.grad``. The loss is ``ctx.loss(outputs, batch)``, or the model's own where its
    outputs have a ``loss`` (as transformers models have when labels are among their inputs).

    Args:
        program: What to run.
        ctx: The batches and the loss.
        names: Parameters to differentiate by; by default all floating ones.
        per_sample: Take each batch apart along its first axis; the program must take batches of
            one.

    Raises:
        PreconditionError: There is no loss, or a loss but no batches to compute it on.
        InputError: The loss is not a scalar that depends on the parameters, or a batch does not
            fit the program.
    """
    wanted = _wanted(program, names)
    check_loss(program, ctx)
    for number, (batch, flat) in enumerate(flat_batches(program, ctx), 1):
        of_batch = f"gradients: batch {number}{of_how_many(ctx)}"
        for sample, (part, inputs) in enumerate(
            samples_of(batch, flat) if per_sample else [(batch, flat)], 1
        ):
            ctx.report(f"{of_batch}, sample {sample}" if per_sample else of_batch)
            yield _gradients(program, ctx, part, inputs, wanted)


def _gradients(
    program: Program, ctx: PassContext, batch: Any, flat: list[Any], wanted: set[str]
) -> Gradients:
    leaves: dict[str, torch.Tensor] = {}

    def leaf(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in wanted:
            return usable(tensor)
        if name not in leaves:
            leaves[name] = usable(tensor).requires_grad_(True)
        return leaves[name]

    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        batch, flat = without_inference(batch), without_inference(flat)
        outputs = program.unflatten_outputs(run_flat(program, flat, replace_tensor=leaf))
        loss = loss_of(ctx, outputs, batch)
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    return Gradients(float(loss.detach()), gradients)


def samples_of(batch: Any, flat: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """One sample at a time: each tensor with the first axis of the batch is cut along it."""
    tensors = [x for x in flat if isinstance(x, torch.Tensor) and x.dim()]
    if not tensors:
        raise InputError("a batch without tensors cannot be taken apart by samples")
    size = tensors[0].shape[0]
    for index in range(size):

        def cut(value: Any, index: int = index) -> Any:
            whole = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == size
            return value[index : index + 1] if whole else value

        yield pytree.tree_map(cut, batch), [cut(value) for value in flat]


def collect_gradients(
    program: Program,
    ctx: PassContext,
    names: Iterable[str] | None = None,
    *,
    per_sample: bool = False,
    **options: Any,
) -> dict[str, GradientMoments]:
    """Sums of gradients and of their squares, over batches or samples.

    Args:
        program: What to run.
        ctx: The batches and the loss; see `stream_gradients`.
        names: Parameters; by default all floating ones.
        per_sample: Squares of the gradients of samples, not of batches.
        **options: ``limit_bytes``, ``spill``, ``resume`` and ``save_every``, as of `collect`.

    Returns:
        Of the parameters that the loss depends on.
    """
    wanted = _wanted(program, names)
    check_loss(program, ctx)
    setting = Calibration.of(ctx.calibration, **options)
    store = MatrixStore(setting.limit_bytes, setting.spill)
    sums = {
        name: (Total(tensor, store.zeros), Total(tensor, store.zeros))
        for name, tensor in program.parameters.items()
        if name in wanted
    }

    def step(index: int, batch: Any, flat: list[Any]) -> None:
        parts = samples_of(batch, flat) if per_sample else iter([(batch, flat)])
        for part, inputs in parts:
            found = _gradients(program, ctx, part, inputs, wanted)
            for name, value in found.values.items():
                total, squares = sums[name]
                total.add(value)
                squares.add_squares(value)

    named = {
        f"{name} {kind}": total
        for name, pair in sums.items()
        for kind, total in zip(("total", "squares"), pair, strict=True)
    }
    about = f"gradients|{per_sample}|{sorted(wanted)}|{ctx.seed}"
    lines = chain((about,), map(callable_text, (ctx.loss,)))
    Stream(program, ctx, setting, named, lines, store, what="gradients").run(step)
    return {
        name: GradientMoments(total.count, total.value, squares.value)
        for name, (total, squares) in sums.items()
        if total.count
    }


def _wanted(program: Program, names: Iterable[str] | None) -> set[str]:
    chosen = program.parameters if names is None else names
    return {n for n in chosen if program.entries[n].tensor.is_floating_point()}
