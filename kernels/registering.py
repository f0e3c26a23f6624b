"""Registers ops that run Triton kernels on GPUs and plain torch ops elsewhere.

An op is a `torch.library.triton_op` whose body branches on the device. That is the one form that
stays a single node in FX and under `torch.export`, decomposes under Inductor, and is packaged by
AOTInductor for a CPU with nothing of Python left; it needs no fake and no Triton to be registered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import UnsupportedError

__all__ = ["differentiate", "no_backward", "register", "with_defaults"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def register(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator that registers a function as ``torchlathe::name`` and gives back the op."""

    def registered(function: Callable[_P, _R]) -> Callable[_P, _R]:
        # Without Triton torch warns that it finds no kernels in the function, which is so.
        logger = logging.getLogger("torch._library.triton")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            made = torch.library.triton_op(f"torchlathe::{name}", function, mutates_args={})
        finally:
            logger.setLevel(level)
        return made

    return registered


def differentiate(op: Any, weight_of: Callable[[tuple[Any, ...]], Tensor] | None = None) -> None:
    """Give a linear op a backward for its activations, its bias, residual and low-rank factors.

    The weights are quantised, and get none: this is for training what lies around them.

    Args:
        op: An op with arguments ``x``, ``bias``, ``residual`` and ``activation``, and perhaps
            ``down`` and ``up``.
        weight_of: Gives the weights, (out, columns), from the op's arguments; the columns may be
            padded. None where there are factors alone.
    """
    names = [argument.name for argument in op._opoverload._schema.arguments]
    places = {name: names.index(name) for name in ("x", "bias", "residual", "activation")}
    factors = {name: names.index(name) for name in ("down", "up") if name in names}

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        inputs = with_defaults(op, inputs)
        tensors = [value if isinstance(value, Tensor) else None for value in inputs]
        if not any(ctx.needs_input_grad[place] for place in factors.values()):
            # What is saved must not hold x where the backward does not need it.
            tensors[places["x"]] = None
        ctx.save_for_backward(*tensors)
        ctx.width = inputs[places["x"]].shape[-1]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(
            other if tensor is None else tensor
            for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
        )
        if inputs[places["activation"]] != "none":
            raise no_backward(inputs[places["activation"]])
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad
        if needed[places["x"]] and weight_of is not None:
            found[places["x"]] = grad @ weight_of(inputs)[:, : ctx.width].to(grad.dtype)
        if needed[places["bias"]]:
            found[places["bias"]] = grad.flatten(0, -2).sum(0)
        if needed[places["residual"]]:
            found[places["residual"]] = grad
        if factors:
            _low_rank_backward(found, needed, inputs, grad, ctx.width, places["x"], **factors)
        return tuple(found)

    op.register_autograd(backward, setup_context=setup)


def with_defaults(op: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """All inputs of an op: the dispatcher leaves out those at the end that are as by default."""
    arguments = op._opoverload._schema.arguments
    return (*inputs, *(argument.default_value for argument in arguments[len(inputs) :]))


def no_backward(activation: str) -> UnsupportedError:
    """What a backward through a fused activation raises."""
    return UnsupportedError(
        f"no backward through the fused activation {activation!r}",
        hint="train with activation='none' and the activation as an op of its own",
    )


def _low_rank_backward(
    found: list[Tensor | None],
    needed: Sequence[bool],
    inputs: tuple[Any, ...],
    grad: Tensor,
    width: int,
    x: int,
    down: int,
    up: int,
) -> None:
    """Add what ``x @ down.T @ up.T`` gives to x, down and up, by their places."""
    rows, columns = inputs[up].shape[0] - grad.shape[-1], inputs[down].shape[1]  # with padding
    narrow_grad = grad @ inputs[up][: grad.shape[-1]]
    if needed[x]:
        term = (narrow_grad @ inputs[down])[..., :width]
        total = found[x]
        found[x] = term if total is None else total + term
    if needed[down]:
        product = narrow_grad.flatten(0, -2).t() @ inputs[x].flatten(0, -2)
        found[down] = F.pad(product, (0, columns - width))
    if needed[up]:
        narrow = inputs[x].flatten(0, -2) @ inputs[down][:, :width].t()
        found[up] = F.pad(grad.flatten(0, -2).t() @ narrow, (0, 0, 0, rows))
