"""Convolutions in 8 bits, and tables that are dequantised row by row."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.making import relative
from torchlathe.ir import OptionError
from torchlathe.kernels.convolution import op as convolution
from torchlathe.kernels.dequantize.formats import FORMATS, format_of, pack
from torchlathe.kernels.embedding import op as embedding

ops = torch.ops.torchlathe


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_it_is_the_convolution(kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    x, x_scales = numbers(2, 5, 7, 8), torch.rand(2)
    values, scales, bias = numbers(6, 5, *kernel), torch.rand(6), torch.randn(6)
    weight = convolution.pack_conv(values, scales)
    geometry = [list(each) for each in (kernel, stride, padding, dilation)]
    found = ops.w8a8_conv2d(x, x_scales, *weight, bias, *geometry, 6, torch.float32, "relu")
    wanted = convolution.reference(
        x, x_scales, values, scales, bias, activation="relu", stride=stride, padding=padding,
        dilation=dilation,
    )  # fmt: skip
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert relative(found, wanted) < 1e-6  # integers are exact, scales are fp32


def test_opcheck_of_a_convolution() -> None:
    weight = convolution.pack_conv(numbers(6, 5, 3, 3), torch.rand(6))
    sizes = ([3, 3], [2, 2], [1, 1], [1, 1])
    args = (numbers(2, 5, 7, 8), torch.rand(2), *weight, None, *sizes, 6, torch.bfloat16)
    torch.library.opcheck(ops.w8a8_conv2d.default, args)


def test_weights_that_are_no_convolution() -> None:
    with pytest.raises(OptionError, match="have four axes, not 2"):
        convolution.pack_conv(numbers(6, 5), torch.rand(6))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_table(name: str) -> None:
    form = format_of(name)
    columns, group = 64, 16 if form.scales != "float" else 32
    # Without the code of an fp8 that is no number.
    codes = torch.randint(0, 2 ** min(form.bits, 7) - 1, (9, columns)).to(form.stored)
    values = pack(codes, form)
    kind = torch.float32 if form.scales == "float" else torch.uint8
    scales = (torch.rand(9, columns // group) * 100 + 1).to(kind)
    total = torch.tensor(0.5) if name == "nvfp4" else None
    indices = torch.tensor([[3, 0, 3], [8, 1, 5]])
    args = (indices, values, scales, None, total, columns, group, name, torch.float32)
    found = ops.quantised_embedding(*args)
    wanted = embedding.reference(
        indices, values, scales, None, total, columns=columns, group=group, format=name,
        dtype=torch.float32,
    )  # fmt: skip
    assert found.shape == (2, 3, columns)
    assert torch.equal(found, wanted)
    torch.library.opcheck(ops.quantised_embedding.default, args)
