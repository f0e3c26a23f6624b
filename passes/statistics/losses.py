"""The loss that gradients are those of: the caller's, or the one in the model's own outputs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.running import need_data

__all__ = ["check_loss", "loss_of"]

# What forward methods of transformers call them.
_LABELS = frozenset({"labels", "next_sentence_label", "start_positions", "end_positions"})


def check_loss(program: Program, ctx: PassContext) -> None:
    """Refuse to begin without a loss, or without batches to compute it on.

    Raises:
        PreconditionError: The caller gave none, and the outputs hold none; with what the class of
            the model could do about it, if it is one of transformers.
    """
    if ctx.loss is not None:
        ctx.need("calibration", "the loss is computed on batches")
        return
    dummies = [torch.empty(0)] * program.out_spec.num_leaves
    if _own_loss(program.unflatten_outputs(dummies)) is None:
        raise PreconditionError(
            f"{ctx.spec} needs loss: gradients are those of a loss, and the outputs hold none",
            hint=_how_to_get_one(program),
        )
    need_data(ctx, "the gradients are those of the model's own loss on them")


def _own_loss(outputs: Any) -> Any:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
    return getattr(outputs, "loss", None) if loss is None else loss


def _how_to_get_one(program: Program) -> str:
    general = "give loss= to compile() or to PassManager.run()"
    # Whoever captured a model of transformers has loaded it.
    kind = getattr(sys.modules.get("transformers"), program.model_name, None)
    if kind is None:
        return general
    names = [n for n in inspect.signature(kind.forward).parameters if n in _LABELS]
    if not names:
        return f"{program.model_name} has no loss of its own: {general}"
    return (
        f"{program.model_name} computes its own loss from {' and '.join(names)}: capture it with "
        f"them among the example inputs, and give batches that have them; or {general}"
    )


def loss_of(ctx: PassContext, outputs: Any, batch: Any) -> torch.Tensor:
    """The loss of one batch: the caller's, or the model's own.

    Raises:
        PreconditionError: The model's own is empty.
        InputError: It is not one number, or has no gradient.
    """
    if ctx.loss is not None:
        loss: Any = ctx.loss(outputs, batch)
    else:
        loss = _own_loss(outputs)
        if loss is None:
            raise PreconditionError(
                "gradients need a loss, and the one in the model's outputs is empty",
                hint="give loss=, or labels among the example inputs",
            )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise InputError(f"the loss must be one number, got {shape}", hint="take its mean or sum")
    if not loss.requires_grad:
        raise InputError(
            "the loss does not depend on the parameters",
            hint="compute it from the outputs that it is given, with gradients on",
        )
    return loss.reshape(())
