"""Batches as the flat inputs of a program, on its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.base import Diagnostic, PassContext

__all__ = ["device_of", "flat_batches", "need_data"]


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
