"""W8A16, W8A8 and W4A8: references against float64, and the ops on a CPU."""

import pytest
import torch

from tests.kernels.making import eight_bits, relative, w4_signed, w8, w8_rows
from torchlathe.ir import OptionError
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16

SHAPES = [(1, 64, 128), (7, 100, 200), (17, 130, 512)]
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_w8a16_reference(m: int, n: int, k: int, group: int) -> None:
    values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    scales = torch.rand(1 if group == 0 else -(-k // group), n) + 0.1
    of = torch.arange(k) // (group or k)
    weight = values.double() * scales[of].T.double()
    x, bias = torch.randn(m, k), torch.randn(n)
    wanted = torch.relu(x.double() @ weight.T + bias.double())
    packed = w8a16.pack(values, scales, group)
    found = w8a16.reference(x, *packed, bias, out_features=n, activation="relu")
    assert relative(found, wanted) < 1e-6  # sums in fp32


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_w4a8_reference(m: int, n: int, k: int, group: int) -> None:
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scales = torch.rand(1 if group == 0 else -(-k // group), n) + 0.1
    of = torch.arange(k) // (group or k)
    weight = values.double() * scales[of].T.double()
    x, x_scales = eight_bits(m, k), torch.rand(m)
    wanted = (x.double() * x_scales.double()[:, None]) @ weight.T
    packed = w4a8.pack(values, scales, group)
    found = w4a8.reference(x, x_scales, *packed, out_features=n)
    assert relative(found, wanted) < 1e-12
    # The op's int32 sums are exact; its scales and groups are multiplied in fp32.
    found = w4a8.w4a8_linear(x, x_scales, *packed, None, None, n, torch.float32)
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_w8a8_reference(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    values, scales = eight_bits(n, k, dtype), torch.rand(n) + 0.1
    x, x_scales = eight_bits(m, k, dtype), torch.rand(m)
    residual = torch.randn(m, n)
    weight = values.double() * scales.double()[:, None]
    wanted = (x.double() * x_scales.double()[:, None]) @ weight.T + residual.double()
    packed = w8a8.pack(values, scales)
    found = w8a8.reference(x, x_scales, *packed, None, residual, out_features=n)
    assert relative(found, wanted) < 1e-12
    found = w8a8.w8a8_linear(x, x_scales, *packed, None, residual, n, torch.float32)
    assert relative(found, wanted) < 1e-6


def test_integer_sums_are_exact() -> None:
    """4,096 products of 127 by 127 are more than fp32 counts one by one, and less than int32's."""
    x = torch.full((2, 4096), 127, dtype=torch.int8)
    weight = torch.full((8, 4096), 127, dtype=torch.int8)
    weight[3, 5] = 126
    found = w8a8.integer_product(x, weight)
    assert found[0, 0] == 127 * 127 * 4096
    assert found[0, 0] - found[0, 3] == 128  # 127, to the next number that fp32 has


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_types_of_results(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 200).to(dtype)
    packed = w8(100, 200, 128, dtype)
    found = w8a16.w8a16_linear(x, *packed, None, None, 100, "gelu")
    wanted = w8a16.reference(x.double(), *packed, out_features=100, activation="gelu")
    assert found.shape == (2, 3, 100)
    assert found.dtype == dtype
    assert relative(found, wanted) < 3 * torch.finfo(dtype).eps
    numbers, scales = eight_bits(6, 200).view(2, 3, 200), torch.rand(2, 3)
    out = w8a8.w8a8_linear(numbers, scales, *w8_rows(100, 200), None, None, 100, dtype)
    assert (out.shape, out.dtype) == ((2, 3, 100), dtype)
    out = w4a8.w4a8_linear(numbers, scales, *w4_signed(100, 200, 0), None, None, 100, dtype)
    assert (out.shape, out.dtype) == ((2, 3, 100), dtype)


def test_opcheck() -> None:
    ops = torch.ops.torchlathe
    x, x_scales = eight_bits(4, 200), torch.rand(4)
    bias = torch.randn(100).bfloat16()
    args = (torch.randn(4, 200).bfloat16(), *w8(100, 200, 0, torch.bfloat16), bias, None, 100)
    torch.library.opcheck(ops.w8a16_linear.default, args)
    rest = (bias, None, 100, torch.bfloat16, "relu")
    torch.library.opcheck(ops.w8a8_linear.default, (x, x_scales, *w8_rows(100, 200), *rest))
    torch.library.opcheck(ops.w4a8_linear.default, (x, x_scales, *w4_signed(100, 200, 128), *rest))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: w8a16.pack(torch.zeros(2, 2), torch.ones(1, 2)), "weights must be int8"),
        (lambda: w8a16.pack(torch.zeros(2, 2).char(), torch.ones(1, 2), 64), "groups of 64"),
        (lambda: w4a8.pack(torch.full((2, 2), 8).char(), torch.ones(1, 2)), "from -8 to 7"),
        (lambda: w4a8.pack(torch.zeros(2, 2).char(), torch.ones(1, 2), 32), "groups of 32"),
        (lambda: w8a8.pack(torch.zeros(2, 2), torch.ones(2)), "not float32"),
        (lambda: w8a8.pack(torch.zeros(2, 2).char(), torch.ones(3)), "2 rows need as many"),
    ],
    ids=["w8-type", "w8-group", "w4-range", "w4-group", "rows-type", "rows-scales"],
)
def test_what_cannot_be_packed_is_refused(call, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        call()
    assert text in str(caught.value)
