"""What is watched while a program runs over the data: values, and gradients, into accumulators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import fx

from torchlathe.ir import OptionError, Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.accumulators import Accumulator
from torchlathe.passes.statistics.calibration import Calibration, Path
from torchlathe.passes.statistics.losses import check_loss, loss_of
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.running import first_extent, usable, without_inference
from torchlathe.passes.statistics.storage import MatrixStore
from torchlathe.passes.statistics.streaming import Stream
from torchlathe.passes.statistics.telling import callable_text
from torchlathe.passes.statistics.watching import Watch

__all__ = ["collect", "collect_moments"]


def collect(
    program: Program,
    ctx: PassContext,
    watches: Iterable[Watch],
    *,
    dtype: torch.dtype | None = None,
    run_dtype: torch.dtype | None = None,
    limit_bytes: int | None = None,
    spill: Path | None = None,
    resume: Path | None = None,
    save_every: int | None = None,
    samples: Callable[[Any], int] | None = None,
) -> dict[Watch, Accumulator]:
    """Run the program over the calibration batches and add up what is watched.

    One pass over the data, with a backward pass through the graph where gradients are watched.
    The values themselves are gone after each batch. No parameter gets a gradient, and none is
    computed but for the values that are watched and those between them and the loss.

    What is not given of ``limit_bytes``, ``spill``, ``resume``, ``save_every`` and ``samples`` is
    as `Calibration` says, if that is what the user gave.

    Args:
        program: What to run.
        ctx: The batches (or example inputs), the loss, and where progress goes.
        watches: What to collect; a value that is watched twice is computed once.
        dtype: Of the matrices: float64 (default) or float32, which takes half the memory.
        run_dtype: Run in this floating dtype; by default as the program is.
        limit_bytes: Memory for the matrices, 2 GiB by default; past it they are in memory-mapped
            files.
        spill: Folder for these files; by default the system's temporary one. They are gone when
            nothing refers to the matrices any more, or when the process ends.
        resume: Folder for the state of the run. It is saved there under a name made from the
            program and from what is watched, and a run that finds its own goes on from it.
        save_every: Save the state after so many batches, 16 by default, and at the end.
        samples: How many samples a batch has, the loss being the mean of theirs; by default the
            first extent of its first tensor.

    Returns:
        What each watch was added to: its ``into``, or `Moments`.

    Raises:
        OptionError: An impossible option; before any work.
        InputError: A batch does not fit the program, there is none, or those that an interrupted
            run has seen are others; or a folder cannot be used.
        PreconditionError: Gradients are watched and there is no loss.
        ArtifactError: The saved state cannot be read.
    """
    dtype = dtype or torch.float64
    if dtype not in (torch.float32, torch.float64):
        raise OptionError(f"dtype of the matrices is {dtype}, but must be float32 or float64")
    setting = Calibration.of(
        ctx.calibration,
        limit_bytes=limit_bytes,
        spill=spill,
        resume=resume,
        save_every=save_every,
        samples=samples,
    )
    store = MatrixStore(setting.limit_bytes, setting.spill)
    found: dict[Watch, Accumulator] = {
        w: w.into or Moments(matrix=w.matrix, dtype=dtype, allocate=store.zeros) for w in watches
    }
    run = _Run(program, ctx, found, run_dtype, setting.samples)
    if run.gradients:
        check_loss(program, ctx)
    loss = map(callable_text, (ctx.loss, setting.samples) if run.gradients else ())
    lines = chain((w.describe() for w in found), map(str, (dtype, run_dtype, ctx.seed)), loss)
    # The number is what tells the accumulators of one node apart.
    named = {f"{w.node.name}.{i}": to for i, (w, to) in enumerate(found.items())}
    Stream(program, ctx, setting, named, lines, store).run(run.step)
    return found


def collect_moments(
    program: Program, ctx: PassContext, watches: Iterable[Watch], **options: Any
) -> dict[Watch, Moments]:
    """`collect` for watches without an ``into`` of their own.

    Args:
        program: What to run.
        ctx: The batches.
        watches: What to sum up.
        **options: Those of `collect`.
    """
    found = collect(program, ctx, watches, **options)
    return {watch: moments for watch, moments in found.items() if isinstance(moments, Moments)}


class _Run:
    """One pass over the data."""

    def __init__(
        self,
        program: Program,
        ctx: PassContext,
        found: Mapping[Watch, Accumulator],
        run_dtype: torch.dtype | None,
        samples: Callable[[Any], int] | None,
    ) -> None:
        self.program, self.ctx, self.found = program, ctx, found
        self.run_dtype = run_dtype
        self.samples = samples
        self.values: dict[fx.Node, list[Watch]] = {}
        self.gradients: dict[fx.Node, list[Watch]] = {}
        for watch in found:
            nodes = self.gradients if watch.gradient else self.values
            nodes.setdefault(watch.node, []).append(watch)
        self.beside = {node for watch in found for node in watch.beside}
        self.kept: dict[fx.Node, Any] = {}  # their values, while a batch runs

    def step(self, index: int, batch: Any, flat: list[Any]) -> None:
        """Add up one batch."""
        self.kept.clear()
        inputs = dict(zip(self.program.input_nodes, flat, strict=True))
        if not self.gradients:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                for node, value in inputs.items():
                    self._add_value(node, value)
                run_flat(self.program, flat, dtype=self.run_dtype, observe=self._add_value)
            return
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            flat = [usable(x) if isinstance(x, torch.Tensor) else x for x in flat]
            self._backward(without_inference(batch), flat)

    def _backward(self, batch: Any, flat: list[Any]) -> None:
        samples = self.samples(batch) if self.samples else first_extent(flat)
        leaves: dict[fx.Node, torch.Tensor] = {}
        missing: dict[fx.Node, torch.Tensor] = {}

        def add(node: fx.Node, gradient: torch.Tensor) -> None:
            missing.pop(node, None)
            for watch in self.gradients[node]:
                watch.add(self.found[watch], gradient * samples, samples)

        def observe(node: fx.Node, value: Any) -> None:
            self._add_value(node, value)
            if node not in self.gradients:
                return
            missing[node] = value.detach().new_zeros(()).expand(value.shape)
            # No parameter needs a gradient: the graph of autograd begins at what is watched.
            if value.requires_grad:
                value.register_hook(partial(add, node))
            else:
                leaves[node] = value.requires_grad_(True)

        for node, value in zip(self.program.input_nodes, flat, strict=True):
            observe(node, value)
        outputs = run_flat(
            self.program,
            flat,
            replace_tensor=lambda _, tensor: usable(tensor),
            dtype=self.run_dtype,
            observe=observe,
        )
        loss = loss_of(self.ctx, self.program.unflatten_outputs(outputs), batch)
        del outputs
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for node, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                add(node, gradient)
        # What the loss does not depend on has the gradient zero.
        for node, zeros in list(missing.items()):
            add(node, zeros)

    def _add_value(self, node: fx.Node, value: Any) -> None:
        if node in self.beside:
            self.kept[node] = value.detach()
        for watch in self.values.get(node, ()):
            others = [self.kept[other] for other in watch.beside]
            watch.add(self.found[watch], value.detach(), others=others)
