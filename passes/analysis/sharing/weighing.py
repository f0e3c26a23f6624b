"""Weights with their curvature, as calibration data and the loss have it.

Source: own. ``curvature=outputs`` is the Gauss-Newton matrix of the squared error of the model's
own outputs: with z of independent standard normal numbers, the gradients of ``<z, f(x)>`` have
``J^T J`` as their second moment, so that K-FAC's factors need neither labels nor a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.passes.analysis.sharing.bases import BasisLayer
from torchlathe.passes.analysis.sharing.candidates import Candidate
from torchlathe.passes.analysis.sharing.costs import WeighedLayer
from torchlathe.passes.analysis.sharing.curvature import (
    Curvature,
    DiagonalCurvature,
    InputCurvature,
    KroneckerCurvature,
)
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import collect_gradients, collect_layers

__all__ = ["CurvatureName", "weigh_layers"]

# Of the second moments of inputs, relative to the mean of their diagonal.
_DAMPING = 1e-6
# How far G is drawn to the multiple of I with its trace. Few samples say little of its directions:
# with 128 sentences, half way kept more of MiniLM's embeddings of others than 0, 0.1 or 1 did.
_SHRINKAGE = 0.5

CurvatureName = Literal["inputs", "outputs", "kfac", "fisher", "none"]


def weigh_layers(
    program: Program, ctx: PassContext, layers: Sequence[Candidate], curvature: CurvatureName
) -> dict[str, WeighedLayer]:
    """The weight of each layer as a float64 matrix, with its curvature.

    Args:
        program: What the layers are of.
        ctx: Calibration data, and the loss for "kfac" and "fisher".
        layers: Whose weights.
        curvature: "inputs" (``I (x) A``, scaled so that a weight of zero costs 1), "outputs" and
            "kfac" (``G (x) A`` of the outputs' squared error, or of the loss), "fisher" (a number
            per element, of the loss) or "none" (plain distances, scaled as "inputs").

    Raises:
        PreconditionError: There is no loss, and the curvature needs one.
    """
    matrices = {layer.name: layer.matrix(program.tensor(layer.name)) for layer in layers}
    if curvature == "none":
        return {layer.name: _plain(matrices[layer.name]) for layer in layers}
    if curvature == "fisher":
        return _fisher(program, ctx, layers, matrices)
    gradients = curvature != "inputs"
    if curvature == "outputs":
        ctx = _probing(program, ctx)
    readers = [reader for layer in layers for reader in layer.readers]
    moments = collect_layers(program, ctx, readers, gradients=gradients)
    found = {}
    for layer in layers:
        mine = [moments[reader.node] for reader in layer.readers]
        inputs = sum((m.inputs.second[0] for m in mine[1:]), mine[0].inputs.second[0]).double()
        outputs = None
        if gradients:
            given = [m.outputs.second[0] for m in mine if m.outputs is not None]
            outputs = (sum(given[1:], given[0]) / len(given)).double()
        found[layer.name] = _weighed(layer, matrices[layer.name], inputs, outputs)
    return found


def _weighed(
    layer: Candidate, weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor | None
) -> WeighedLayer:
    if not bool(inputs.isfinite().all()) or not bool(weight.isfinite().all()):
        raise InputError(
            f"{layer.name} or what it reads holds numbers that are not finite",
            hint="look for NaN or infinite weights, or inputs that overflow",
        )
    # Directions that the data does not show have to cost something too.
    inputs = inputs + _DAMPING * inputs.diagonal().mean() * torch.eye(
        len(inputs), dtype=inputs.dtype, device=inputs.device
    )
    if outputs is None:
        scale = float((weight @ inputs * weight).sum())
        inputs = inputs * (2 / scale if scale > 0 else 1.0)
        return WeighedLayer(weight, InputCurvature(inputs), BasisLayer(weight, inputs))
    outputs = (1 - _SHRINKAGE) * outputs + _SHRINKAGE * outputs.diagonal().mean() * torch.eye(
        len(outputs), dtype=outputs.dtype, device=outputs.device
    )
    curvature: Curvature = KroneckerCurvature(((outputs, inputs),))
    return WeighedLayer(weight, curvature, BasisLayer(weight, inputs, outputs))


def _plain(weight: torch.Tensor) -> WeighedLayer:
    norm = float(weight.square().sum())
    scale = 2 / norm if norm > 0 else 1.0
    identity = torch.eye(weight.shape[1], dtype=weight.dtype) * scale
    curvature = DiagonalCurvature(torch.full_like(weight, scale))
    return WeighedLayer(weight, curvature, BasisLayer(weight, identity))


def _fisher(
    program: Program,
    ctx: PassContext,
    layers: Sequence[Candidate],
    matrices: Mapping[str, torch.Tensor],
) -> dict[str, WeighedLayer]:
    gradients = collect_gradients(program, ctx, matrices)
    found = {}
    for layer in layers:
        squares = gradients.get(layer.name)
        if squares is None:
            raise PreconditionError(
                f"the loss does not depend on {layer.name}",
                hint="leave it out with exclude, or take another curvature",
            )
        values = layer.matrix(squares.squares / squares.count)
        found[layer.name] = WeighedLayer(matrices[layer.name], DiagonalCurvature(values))
    return found


def _probing(program: Program, ctx: PassContext) -> PassContext:
    """The same batches, with a random linear function of the outputs as the loss."""
    generator = torch.Generator().manual_seed(ctx.seed)

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        tensors = [
            value
            for value in pytree.tree_leaves(outputs)
            if isinstance(value, torch.Tensor) and value.requires_grad and value.dim()
        ]
        if not tensors:
            raise InputError(
                "no output depends on the parameters, so there is nothing to keep",
                hint="take curvature=inputs",
            )
        total = torch.zeros((), device=tensors[0].device)
        for value in tensors:
            probe = torch.randn(value.shape, generator=generator).to(value)
            total = total + (probe * value).sum() / value.shape[0]
        return total

    calibration = ctx.calibration
    if calibration is None:
        calibration = [batch for batch, _, _ in ctx.batches()]
    return replace(ctx, loss=loss, calibration=calibration)
