"""The loss over the calibration batches, as a function of the program's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlathe.ir import InputError, OptionError, PreconditionError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.losses import check_loss, loss_of
from torchlathe.passes.statistics.running import count_batches, flat_batches

__all__ = ["Batch", "Objective", "Vector"]

Vector = dict[str, torch.Tensor]  # one tensor per parameter, in its shape

_LOOK_UPS = (torch.ops.aten.embedding.default,)
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch.

    Attributes:
        index: Its place, which its random numbers (dropout in a graph) follow from.
        given: As it came, for the loss.
        flat: Flat inputs of the program.
    """

    index: int
    given: Any
    flat: list[Any]


class Objective:
    """The mean over batches of the loss, as a function of some parameters.

    The graph and its tensors are those of the program at the time of making this: edits of the
    program later on do not count. Halves are computed with in float32. Every run of a batch draws
    the same random numbers, and the caller's are left alone. Attention runs through its plain
    kernel, because the fused ones have no second derivative. The row of an embedding that padding
    reads is a parameter like any other, while autograd leaves it out of gradients.

    Args:
        program: What to run.
        ctx: The batches and the loss; see `statistics.stream_gradients`.
        names: Parameters to vary; by default all floating ones.
        batches: Take only so many of the batches; None for all.

    Attributes:
        names: The parameters, each tied one once.
        dtype: What is computed with, where the program is in half precision; else None.

    Raises:
        PreconditionError: There is no loss, or a loss but no batches.
        OptionError: A name is not that of a floating parameter.
    """

    def __init__(
        self,
        program: Program,
        ctx: PassContext,
        names: Iterable[str] | None = None,
        *,
        batches: int | None = None,
    ) -> None:
        check_loss(program, ctx)
        self.program = _with_whole_gradients(program)
        self.ctx = replace(ctx, program=self.program)
        self.limit = batches
        floating = {n: t for n, t in program.parameters.items() if t.is_floating_point()}
        wanted = floating if names is None else [program.aliases.get(n, n) for n in names]
        if unknown := next((name for name in wanted if name not in floating), None):
            raise OptionError(f"{unknown} is not a floating parameter of {program.model_name}")
        self.names = tuple(dict.fromkeys(wanted))
        halves = any(tensor.dtype in _HALVES for tensor in floating.values())
        self.dtype = torch.float32 if halves else None

    def only(self, names: Iterable[str]) -> Objective:
        """The same loss as a function of other parameters."""
        return Objective(self.program, self.ctx, names, batches=self.limit)

    def parameters(self) -> Vector:
        """The values, detached."""
        found = {}
        for name in self.names:
            tensor = self.program.entries[name].tensor
            tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
            found[name] = tensor if self.dtype is None else tensor.to(self.dtype)
        return found

    def leaves(self) -> Vector:
        """The values, as new leaves of autograd that share memory with the program."""
        return {name: t.detach().requires_grad_(True) for name, t in self.parameters().items()}

    def __iter__(self) -> Iterator[Batch]:
        for index, (given, flat) in enumerate(flat_batches(self.program, self.ctx)):
            if self.limit is not None and index >= self.limit:
                return
            yield Batch(index, given, flat)

    def __len__(self) -> int:
        known = count_batches(self.ctx, self.limit)
        return sum(1 for _ in self) if known is None else known

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """Gradients on, attention that can be derived twice, and random numbers of the batch."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
            sdpa_kernel(SDPBackend.MATH),
        ):
            torch.manual_seed(self.ctx.seed + batch.index)
            yield

    def outputs(
        self,
        values: Mapping[str, torch.Tensor],
        batch: Batch,
        observe: Callable[[fx.Node, Any], None] | None = None,
    ) -> list[Any]:
        """Flat outputs with these values of the parameters; other tensors are as they are."""

        def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name in values:
                return values[name]
            return tensor.clone() if tensor.is_inference() else tensor.detach()

        return run_flat(
            self.program, batch.flat, replace_tensor=read, dtype=self.dtype, observe=observe
        )

    def loss_from(self, outputs: list[Any], batch: Batch) -> torch.Tensor:
        """The loss of flat outputs.

        Raises:
            InputError: It is not one number, or does not depend on the parameters.
        """
        return loss_of(self.ctx, self.program.unflatten_outputs(outputs), batch.given)

    def loss(self, values: Mapping[str, torch.Tensor], batch: Batch) -> torch.Tensor:
        """The loss of one batch with these values of the parameters."""
        return self.loss_from(self.outputs(values, batch), batch)

    def value(self, delta: Mapping[str, torch.Tensor] | None = None) -> float:
        """The mean loss over the batches, with the parameters moved by ``delta``."""
        total, count = 0.0, 0
        values = self.parameters()
        for name, change in (delta or {}).items():
            values[name] = values[name] + change
        for batch in self:
            with self.running(batch):
                with torch.no_grad():
                    outputs = self.outputs(values, batch)
                # Leaves of their own, for a loss has to depend on something.
                ready = [_leaf(value) for value in outputs]
                total += float(self.loss_from(ready, batch).detach())
            count += 1
        return total / count

    def heads(self, outputs: list[Any]) -> list[int]:
        """Which flat outputs the loss is computed from: where the Gauss-Newton matrix is cut.

        Raises:
            PreconditionError: The loss is the model's own, and no ``logits`` beside it.
        """
        if self.ctx.loss is not None:
            floating = [
                i
                for i, value in enumerate(outputs)
                if isinstance(value, torch.Tensor) and value.is_floating_point()
            ]
            if not floating:
                raise InputError("the program has no floating output for a loss")
            return floating
        whole = self.program.unflatten_outputs(outputs)
        logits = whole.get("logits") if isinstance(whole, Mapping) else None
        logits = getattr(whole, "logits", None) if logits is None else logits
        found = [i for i, value in enumerate(outputs) if value is logits and value is not None]
        if not found:
            raise PreconditionError(
                "the Gauss-Newton matrix needs the outputs that the loss is computed from, and the "
                "model's own loss comes without logits",
                hint="give loss=, a function of the other outputs",
            )
        return found[:1]


def _leaf(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_(True) if floating else value


def _with_whole_gradients(program: Program) -> Program:
    """A copy in which embeddings have no padding row, whose gradient autograd takes for zero.

    Double backward leaves that row out twice and forward over reverse once, so that the Hessian
    would not even be symmetric.
    """
    program = program.copy()
    padded = [n for n in program.nodes if n.target in _LOOK_UPS and len(n.args) + len(n.kwargs) > 2]
    if padded:
        with program.edit() as edit:
            for node in padded:
                edit.set_args(node, node.args[:2], {})
    return program
