"""Every op of the package: importing this module registers them all.

A saved program names ops; whoever reads it imports this first.
"""

from __future__ import annotations

from torchlathe.kernels.dequantize.op import (
    dequantize,
    quantize_dequantize_tokens,
    quantize_tokens,
)
from torchlathe.kernels.norm_quantise.op import add_norm_quantise, norm_quantise
from torchlathe.kernels.w4a8.op import w4a8_linear
from torchlathe.kernels.w4a16.cpu import w4a16_cpu_linear
from torchlathe.kernels.w4a16.op import w4a16_linear, w4a16_low_rank_linear
from torchlathe.kernels.w4a16_experts.op import w4a16_experts_linear
from torchlathe.kernels.w8a8.op import w8a8_linear
from torchlathe.kernels.w8a16.cpu import w8a16_cpu_linear
from torchlathe.kernels.w8a16.op import w8a16_linear

__all__ = [
    "add_norm_quantise",
    "dequantize",
    "norm_quantise",
    "quantize_dequantize_tokens",
    "quantize_tokens",
    "w4a8_linear",
    "w4a16_cpu_linear",
    "w4a16_experts_linear",
    "w4a16_linear",
    "w4a16_low_rank_linear",
    "w8a8_linear",
    "w8a16_cpu_linear",
    "w8a16_linear",
]
