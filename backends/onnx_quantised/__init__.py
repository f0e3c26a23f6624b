"""Quantised layers in ONNX: as integer products and n-bit products that ONNX Runtime has.

Before the export, the logical form of a quantised linear layer becomes one op of this package,
whose meaning is plain torch; the exporter then writes what ``translating`` says for it.
"""

from torchlathe.backends.onnx_quantised.rewriting import rewrite_quantised
from torchlathe.backends.onnx_quantised.translating import translations

__all__ = ["rewrite_quantised", "translations"]
