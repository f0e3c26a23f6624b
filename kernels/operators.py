"""Every op of the package: importing this module registers them all.

A saved program names ops; whoever reads it imports this first.
"""

from __future__ import annotations

from torchlathe.kernels.block_sparse.op import block_sparse_linear
from torchlathe.kernels.convolution.op import w8a8_conv2d
from torchlathe.kernels.dequantize.cache import dequantize_cache, quantize_cache
from torchlathe.kernels.dequantize.op import (
    dequantize,
    quantize_dequantize_tokens,
    quantize_tokens,
)
from torchlathe.kernels.embedding.op import quantised_embedding
from torchlathe.kernels.low_rank.op import low_rank_linear
from torchlathe.kernels.norm_quantise.op import add_norm_quantise, norm_quantise
from torchlathe.kernels.semi_structured.op import semi_structured_linear
from torchlathe.kernels.w4a8.op import w4a8_linear, w4a8_low_rank_linear
from torchlathe.kernels.w4a16.cpu import w4a16_cpu_linear
from torchlathe.kernels.w4a16.op import w4a16_linear, w4a16_low_rank_linear
from torchlathe.kernels.w4a16_experts.op import w4a16_experts_linear
from torchlathe.kernels.w8a8.op import w8a8_linear, w8a8_low_rank_linear
from torchlathe.kernels.w8a8_experts.op import w8a8_experts_linear
from torchlathe.kernels.w8a16.cpu import w8a16_cpu_linear
from torchlathe.kernels.w8a16.op import w8a16_linear, w8a16_low_rank_linear
from torchlathe.kernels.w8a16_experts.op import w8a16_experts_linear

__all__ = [
    "add_norm_quantise",
    "block_sparse_linear",
    "dequantize",
    "dequantize_cache",
    "low_rank_linear",
    "norm_quantise",
    "quantised_embedding",
    "quantize_cache",
    "quantize_dequantize_tokens",
    "quantize_tokens",
    "semi_structured_linear",
    "w4a8_linear",
    "w4a8_low_rank_linear",
    "w4a16_cpu_linear",
    "w4a16_experts_linear",
    "w4a16_linear",
    "w4a16_low_rank_linear",
    "w8a8_conv2d",
    "w8a8_experts_linear",
    "w8a8_linear",
    "w8a8_low_rank_linear",
    "w8a16_cpu_linear",
    "w8a16_experts_linear",
    "w8a16_linear",
    "w8a16_low_rank_linear",
]
