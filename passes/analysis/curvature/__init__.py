"""Curvature of the loss: exact products, traces, spectra, Kronecker factors, predicted costs."""

from torchlathe.passes.analysis.curvature.deltas import (
    erase_delta,
    low_rank_delta,
    quantise_delta,
    tie_delta,
)
from torchlathe.passes.analysis.curvature.factors import LayerCurvature
from torchlathe.passes.analysis.curvature.hessian_sensitivity import HessianSensitivity
from torchlathe.passes.analysis.curvature.objective import Objective
from torchlathe.passes.analysis.curvature.products import Products
from torchlathe.passes.analysis.curvature.sensitivity import Prediction, Sensitivity
from torchlathe.passes.analysis.curvature.spectrum import dense, eigenvalues
from torchlathe.passes.analysis.curvature.traces import TraceEstimate

__all__ = [
    "HessianSensitivity",
    "LayerCurvature",
    "Objective",
    "Prediction",
    "Products",
    "Sensitivity",
    "TraceEstimate",
    "dense",
    "eigenvalues",
    "erase_delta",
    "low_rank_delta",
    "quantise_delta",
    "tie_delta",
]
