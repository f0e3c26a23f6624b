"""What the exporter writes for the ops of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["translations"]

_LEAST = 2.0**-100


def translations() -> dict[Any, Callable[..., Any]]:
    """Functions by op, as ``torch.onnx.export`` takes them in ``custom_translation_table``."""
    from torchlathe.backends.onnx_quantised import ops

    return {
        ops.quantize_rows._opoverload: _quantize_rows,
        ops.integer_linear._opoverload: _integer_linear,
        ops.nbits_linear._opoverload: _nbits_linear,
    }


def _standard() -> Any:
    import onnxscript

    return onnxscript.opset18


@functools.cache
def _contrib(name: str, inputs: int, attributes: tuple[str, ...] = ()) -> Any:
    """An op of ONNX Runtime's own domain, of which the onnx package has no schema."""
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    made = schema(
        name,
        "com.microsoft",
        1,
        inputs=[
            schema.FormalParameter(f"i{i}", f"T{i}", param_option=optional) for i in range(inputs)
        ],
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[
            (f"T{i}", ["tensor(float)", "tensor(uint8)", "tensor(int8)"], "")
            for i in ("", *range(inputs))
        ],
        attributes=[
            schema.Attribute(attribute, schema.AttrType.INT, "") for attribute in attributes
        ],
    )
    return onnxscript.values.Op(onnxscript.values.Opset("com.microsoft", 1), name, made)


def _quantize_rows(x: Any) -> Any:
    import onnx

    op = _standard()
    columns = x.shape[-1]
    rows = op.Reshape(x, op.Constant(value_ints=[-1, int(columns)]))
    last = op.Constant(value_ints=[-1])
    most = op.ReduceMax(op.Abs(rows), last, keepdims=1)
    least = op.Constant(value_float=_LEAST)
    scales = op.Mul(op.Max(most, least), op.Constant(value_float=1.0 / 127.0))
    flat = op.Squeeze(scales, last)
    centre = op.Constant(value=onnx.helper.make_tensor("centre", onnx.TensorProto.UINT8, [], [128]))
    # One op divides, rounds half to even, shifts and narrows.
    numbers = op.QuantizeLinear(rows, flat, op.Expand(centre, op.Shape(flat)), axis=0)
    return numbers, scales


def _integer_linear(
    like: Any, numbers: Any, row_scales: Any, weight: Any, scales: Any, bias: Any = None
) -> Any:
    import onnx

    op = _standard()
    one = op.Constant(value_float=1.0)
    centre = op.Constant(value=onnx.helper.make_tensor("centre", onnx.TensorProto.UINT8, [], [128]))
    fused = _contrib("MatMulIntegerToFloat", 5)
    product = fused(numbers, weight, one, scales, centre)
    product = op.Mul(product, row_scales)
    if bias is not None:
        product = op.Add(product, bias)
    outs = op.Constant(value_ints=[int(weight.shape[1])])
    return op.Reshape(product, op.Concat(op.Shape(like, end=-1), outs, axis=0))


def _nbits_linear(
    x: Any,
    values: Any,
    scales: Any,
    zeros: Any,
    bits: int,
    group: int,
    level: int,
    bias: Any = None,
) -> Any:
    op = _standard()
    outs, groups = int(values.shape[0]), int(values.shape[1])
    fused = _contrib("MatMulNBits", 4, ("K", "N", "bits", "block_size", "accuracy_level"))
    product = fused(
        x,
        values,
        scales,
        zeros,
        K=groups * group,
        N=outs,
        bits=bits,
        block_size=group,
        accuracy_level=level,
    )
    return product if bias is None else op.Add(product, bias)
