"""Weights with their curvature, as calibration data and the loss have it.

What is curvature of the loss comes from `HessianSensitivity`, whose result passes share.

Source: own. ``curvature=outputs`` is the Gauss-Newton matrix of the squared error of the model's
own outputs: with z of independent standard normal numbers, the gradients of ``<z, f(x)>`` have
``J^T J`` as their second moment, so that K-FAC's factors need neither labels nor a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

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
from torchlathe.passes.statistics import Calibration, collect_layers
from torchlathe.passes.statistics.saving import batch_digest

if TYPE_CHECKING:
    from torchlathe.passes.analysis.curvature import HessianSensitivity, Sensitivity

__all__ = [
    "OF_THE_LOSS",
    "CurvatureName",
    "element_curvature",
    "loss_analysis",
    "weigh_layers",
]

# Of the second moments of inputs, relative to the mean of their diagonal.
_DAMPING = 1e-6
# How far G is drawn to the multiple of I with its trace. Few samples say little of its directions:
# with 128 sentences, half way kept more of MiniLM's embeddings of others than 0, 0.1 or 1 did
# (tried by hand; no table was kept).
_SHRINKAGE = 0.5

CurvatureName = Literal["inputs", "outputs", "kfac", "diagonal", "fisher", "none"]
# Those that a loss has, and `HessianSensitivity` knows.
OF_THE_LOSS = ("kfac", "diagonal", "fisher")


def weigh_layers(
    program: Program, ctx: PassContext, layers: Sequence[Candidate], curvature: CurvatureName
) -> dict[str, WeighedLayer]:
    """The weight of each layer as a float64 matrix, with its curvature.

    Args:
        program: What the layers are of.
        ctx: Calibration data, and the loss for "kfac", "diagonal" and "fisher".
        layers: Whose weights.
        curvature: "inputs" (``I (x) A``, scaled so that a weight of zero costs 1), "outputs" and
            "kfac" (``G (x) A`` of the outputs' squared error, or of the loss), "diagonal" (a number
            per element, of the loss' Gauss-Newton matrix), "fisher" (of the squares of its
            gradients) or "none" (plain distances, scaled as "inputs").

    Raises:
        PreconditionError: There is no loss, and the curvature needs one.
        InputError: Numbers that are not finite.
    """
    matrices = {layer.name: layer.matrix(program.tensor(layer.name)) for layer in layers}
    for name, matrix in matrices.items():
        if not bool(matrix.isfinite().all()):
            raise InputError(
                f"{name} holds numbers that are not finite",
                hint="look for NaN or infinite weights",
            )
    if curvature == "none":
        return {layer.name: _plain(matrices[layer.name]) for layer in layers}
    if curvature in OF_THE_LOSS:
        return _of_the_loss(program, ctx, layers, matrices, curvature)
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
        mean = sum((m.inputs.mean[0] for m in mine[1:]), mine[0].inputs.mean[0]) / len(mine)
        found[layer.name] = _weighed(layer, matrices[layer.name], inputs, outputs, mean)
    return found


def element_curvature(
    layers: Sequence[Candidate], weighed: Mapping[str, WeighedLayer]
) -> dict[str, torch.Tensor]:
    """The diagonal of the curvature of weights and biases, by name and in their shapes; float64."""
    found: dict[str, torch.Tensor] = {}
    for layer in layers:
        known = weighed[layer.name]
        diagonal = known.curvature.diagonal(known.weight.shape)
        found[layer.name] = layer.tensor(diagonal, diagonal)
        if layer.bias is not None and known.outputs is not None:
            found[layer.bias] = known.outputs
    return found


def _weighed(
    layer: Candidate,
    weight: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor | None,
    mean: torch.Tensor,
) -> WeighedLayer:
    if not bool(inputs.isfinite().all()):
        raise InputError(
            f"what {layer.name} reads holds numbers that are not finite",
            hint="look for NaN or infinite weights, or inputs that overflow",
        )
    # Directions that the data does not show have to cost something too.
    inputs = inputs + _DAMPING * inputs.diagonal().mean() * torch.eye(
        len(inputs), dtype=inputs.dtype, device=inputs.device
    )
    if outputs is None:
        scale = float((weight @ inputs * weight).sum())
        factor = 2 / scale if scale > 0 else 1.0
        basis = BasisLayer(weight, inputs * factor)
        ones = weight.new_full((len(weight),), factor)
        return WeighedLayer(weight, InputCurvature(basis.inputs), basis, ones, mean.double())
    outputs = (1 - _SHRINKAGE) * outputs + _SHRINKAGE * outputs.diagonal().mean() * torch.eye(
        len(outputs), dtype=outputs.dtype, device=outputs.device
    )
    curvature: Curvature = KroneckerCurvature(((outputs, inputs),))
    basis = BasisLayer(weight, inputs, outputs)
    return WeighedLayer(weight, curvature, basis, outputs.diagonal(), mean.double())


def _plain(weight: torch.Tensor) -> WeighedLayer:
    norm = float(weight.square().sum())
    scale = 2 / norm if norm > 0 else 1.0
    identity = torch.eye(weight.shape[1], dtype=weight.dtype) * scale
    curvature = DiagonalCurvature(torch.full_like(weight, scale))
    return WeighedLayer(weight, curvature, BasisLayer(weight, identity))


def loss_analysis(curvature: CurvatureName) -> HessianSensitivity:
    """The analysis that knows a curvature of the loss."""
    from torchlathe.passes.analysis.curvature import HessianSensitivity

    if curvature == "fisher":
        return HessianSensitivity(samples=0, diagonal="fisher", factors=False)
    return HessianSensitivity(samples=0)


def _of_the_loss(
    program: Program,
    ctx: PassContext,
    layers: Sequence[Candidate],
    matrices: Mapping[str, torch.Tensor],
    curvature: CurvatureName,
) -> dict[str, WeighedLayer]:
    sensitivity = replace(ctx, program=program).analysis(loss_analysis(curvature))
    found = {}
    for layer in layers:
        known = sensitivity.layers_of(layer.name)
        diagonal = sensitivity.diagonal(layer.name)
        if not known if curvature == "kfac" else not bool(diagonal.any()):
            raise PreconditionError(
                f"the loss does not depend on {layer.name}",
                hint="leave it out with exclude, or take another curvature",
            )
        weight = matrices[layer.name]
        if curvature == "kfac":
            inputs = torch.stack([each.inputs[0].double() for each in known]).sum(0)
            outputs = torch.stack([each.outputs[0].double() for each in known]).mean(0)
            mean = torch.stack([each.mean[0].double() for each in known]).mean(0)
            found[layer.name] = _weighed(layer, weight, inputs, outputs, mean)
        else:
            values = DiagonalCurvature(layer.matrix(diagonal))
            found[layer.name] = WeighedLayer(weight, values, None, _bias_of(sensitivity, layer))
    return found


def _bias_of(sensitivity: Sensitivity, layer: Candidate) -> torch.Tensor | None:
    return None if layer.bias is None else sensitivity.diagonal(layer.bias).double()


def _probing(program: Program, ctx: PassContext) -> PassContext:
    """The same batches, with a random linear function of the outputs as the loss."""
    generator = torch.Generator().manual_seed(ctx.seed)
    resumes = Calibration.of(ctx.calibration).resume is not None

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        if resumes:  # batches that were seen before are skipped, and must not count
            generator.manual_seed(int(batch_digest(str(ctx.seed), batch)[:15], 16))
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
