"""Batches as the flat inputs of a program, on its device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.statistics.calibration import Calibration

__all__ = [
    "count_batches",
    "device_of",
    "first_extent",
    "flat_batches",
    "need_data",
    "of_how_many",
    "usable",
    "without_inference",
]


def device_of(program: Program) -> torch.device:
    """Where the program computes: the device of its first parameter."""
    for tensor in program.parameters.values():
        return tensor.device
    return torch.device("cpu")


def need_data(ctx: PassContext, why: str) -> None:
    """Warn if there is no calibration data, so that the example inputs have to do."""
    if ctx.calibration is None:
        message = f"no calibration data was given, so the example inputs stand for it: {why}"
        ctx.tell(Diagnostic("warning", message))


def flat_batches(program: Program, ctx: PassContext) -> Iterator[tuple[Any, list[Any]]]:
    """Each batch as it came, and its flat inputs on the device of the program.

    Raises:
        InputError: A batch does not fit the program, or there is none.
        PreconditionError: The program has no values to compute with.
    """
    if reason := cannot_run(program):
        raise PreconditionError(
            f"statistics of data need a program that runs: {reason}",
            hint="capture the model with its weights",
        )
    device = device_of(program)
    count = 0
    for index, (batch, args, kwargs) in enumerate(ctx.batches()):
        try:
            flat = program.flatten_inputs(args, kwargs)
        except InputError as error:
            raise InputError(
                f"calibration batch {index} does not fit the program: {error.message}",
                where=error.where,
                hint=error.hint,
            ) from error
        count += 1
        moved = [x.detach().to(device) if isinstance(x, torch.Tensor) else x for x in flat]
        yield batch, moved
    if not count:
        raise InputError("the calibration data holds no batch", hint="give at least one")


def first_extent(flat: Iterable[Any]) -> int:
    """The number of samples in a batch: the first extent of its first tensor; 1 without one."""
    return next((x.shape[0] for x in flat if isinstance(x, torch.Tensor) and x.dim()), 1)


def without_inference(values: Any) -> Any:
    """Tensors of inference mode in a batch are copied, for autograd cannot read them."""
    return pytree.tree_map_only(
        torch.Tensor, lambda x: usable(x) if x.is_inference() else x, values
    )


def usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor for autograd to read: detached; a copy of one of inference mode."""
    return (tensor.clone() if tensor.is_inference() else tensor).detach()


def count_batches(ctx: PassContext, limit: int | None = None) -> int | None:
    """The number of batches, of at most so many; None where only a pass over them would tell."""
    data = ctx.calibration.batches if isinstance(ctx.calibration, Calibration) else ctx.calibration
    if data is None:
        return 1  # the example inputs
    if not isinstance(data, Sized):
        return None
    return len(data) if limit is None else min(limit, len(data))


def of_how_many(ctx: PassContext, limit: int | None = None) -> str:
    """The number of batches after that of one of them, where it is known."""
    count = None if ctx.calibration is None else count_batches(ctx, limit)
    return "" if count is None else f" of {count}"
