"""Second moments of what each layer reads, and of the gradients of what it gives.

With the rows x of its input and the gradients g of its result, the layer's block of the curvature
is taken to be the Kronecker product ``G (x) A`` with ``A = E[x x^T]`` and ``G = E[g g^T]``.

Source: K-FAC (arXiv 1503.05671); its form for weights that are used at many positions is "expand"
of arXiv 2311.00636, section 3: positions are summed over in G and averaged over in A.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.calibration import Path
from torchlathe.passes.statistics.collecting import collect_moments
from torchlathe.passes.statistics.moments import Moments
from torchlathe.passes.statistics.readers import Reader, patches, readers_of, unfolds
from torchlathe.passes.statistics.watching import Watch

__all__ = ["LayerMoments", "collect_layers"]

# Elements of patches that are made at a time.
_AT_ONCE = 2**23


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What is known of one layer: the moments of its rows.

    Attributes:
        reader: The contraction.
        inputs: Of the data that the weight is multiplied with, a row per sample and position:
            ``inputs.second`` is A, (groups, features, features). Features are what is summed
            over; for convolutions of one and two dimensions channels x kernel, see `unfolded`.
        outputs: Of the gradients of the per-sample loss with respect to the layer's result, a row
            per sample and position, but ``outputs.count`` is the number of *samples*:
            ``outputs.second`` is G, (groups, outs, outs), the sum over positions and the mean
            over samples, so that ``G (x) A`` needs no further factor. None unless asked for.
        unfolded: Whether the features are the patches of a convolution.
    """

    reader: Reader
    inputs: Moments
    outputs: Moments | None = None
    unfolded: bool = False

    def weight_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, outs, features): see `Reader.layer_matrix`."""
        return self.reader.layer_matrix(weight)

    def weight_from(self, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of `weight_matrix`: see `Reader.weight_from_layer`."""
        return self.reader.weight_from_layer(matrix, shape)


def collect_layers(
    program: Program,
    ctx: PassContext,
    readers: Iterable[Reader] | None = None,
    *,
    gradients: bool = False,
    dtype: torch.dtype | None = None,
    limit_bytes: int | None = None,
    spill: Path | None = None,
    resume: Path | None = None,
    **options: Any,
) -> dict[fx.Node, LayerMoments]:
    """Moments of the inputs of layers, and of the gradients of their results.

    One pass over the data. Layers that read one value in one way (queries, keys and values) share
    the moments of it.

    The loss must be a mean over the samples of a batch; its gradients are multiplied by their
    number. Where it is a mean over tokens instead, as that of a language model is, say so with
    ``samples``, a callable that counts them.

    Args:
        program: What to run.
        ctx: The batches (or example inputs), the loss, and where progress goes.
        readers: The layers; by default all of `readers_of`.
        gradients: Whether to collect those of the results as well.
        dtype: Of the matrices: float64 (default) or float32.
        limit_bytes: Memory for the matrices, 2 GiB by default; past it they are in files.
        spill: Folder for these files.
        resume: Folder for the state of the run, to go on from after an interruption.
        **options: Further ones of `collect`: ``run_dtype``, ``save_every``, ``samples``.

    Returns:
        By node of the reader, in the order of the readers.

    Raises:
        Error: As `collect` does.
    """
    chosen = list(readers_of(program).values() if readers is None else readers)
    shared: dict[Any, Watch] = {}
    inputs = {r: shared.setdefault(_same_rows(r), _input_watch(r)) for r in chosen}
    outputs = (
        {r: Watch(r.node, r.result_rows, matrix=True, gradient=True) for r in chosen}
        if gradients
        else {}
    )
    found = collect_moments(
        program,
        ctx,
        [*shared.values(), *outputs.values()],
        dtype=dtype,
        limit_bytes=limit_bytes,
        spill=spill,
        resume=resume,
        **options,
    )
    return {
        r.node: LayerMoments(
            r, found[inputs[r]], found[outputs[r]] if gradients else None, unfolds(r)
        )
        for r in chosen
    }


def _same_rows(reader: Reader) -> tuple[Any, ...]:
    """Equal for readers that read the same value in the same way: their moments are one."""
    letters = tuple(sorted(reader.letters.items()))
    if not unfolds(reader):
        return (reader.operand, reader.data_axes, reader.groups, reader.read, letters)
    names = ("stride", "padding", "dilation", "groups")
    settings = [repr(argument(reader.node, name)) for name in names]
    return (reader.operand, *settings, argument(reader.node, "weight").meta["val"].shape[1:])


def _input_watch(reader: Reader) -> Watch:
    if not unfolds(reader):
        return Watch(reader.operand, reader.data_rows, matrix=True)
    return Watch(reader.operand, partial(_patches, reader), matrix=True)


def _patches(reader: Reader, value: torch.Tensor) -> Iterator[torch.Tensor]:
    """The patches of a few samples at a time: together they are many times the value."""
    weight: Any = argument(reader.node, "weight")
    shape = weight.meta["val"].shape
    batched = value if value.dim() == len(shape) else value[None]
    each = batched[0].numel() * math.prod(shape[2:])
    for part in batched.split(max(1, _AT_ONCE // max(1, each))):
        rows = patches(reader, part)
        assert rows is not None
        yield rows
