# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.kernels.making import blocks, relative
from torchlathe.ir import OptionError, UnsupportedError
from torchlathe.kernels.block_sparse import op as block_sparse


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([64, 128]), st.integers(0, 99))
def test_packing_loses_nothing(n: int, k: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    packed = blocks(n, k, size, torch.float32)
    weight = block_sparse.dense(*packed, k)
    assert weight.shape == (-(-n // size) * size, -(-k // size) * size)
    again = block_sparse.pack(weight[:n, :k], size)
    for one, other in zip(packed, again, strict=True):
        assert torch.equal(one, other)
    assert packed.offsets[-1] == packed.columns.shape[0] == packed.values.shape[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("n", "k", "size"), [(100, 200, 64), (256, 384, 128)])
def test_op_on_a_cpu(n: int, k: int, size: int, dtype: torch.dtype) -> None:
    packed = blocks(n, k, size, dtype)
    weight = block_sparse.dense(*packed, k)[:n, :k].double()
    x, bias = torch.randn(2, 3, k).to(dtype), torch.randn(n).to(dtype)
    residual = torch.randn(2, 3, n).to(dtype)
    args = (x, *packed, bias, residual, n, "relu")
    found = torch.ops.torchlathe.block_sparse_linear(*args)
    wanted = F.relu(x.double() @ weight.T + bias.double()) + residual.double()
    assert (found.shape, found.dtype) == ((2, 3, n), dtype)
    # Each block's product and the result are rounded.
    assert relative(found, wanted) < 3 * torch.finfo(dtype).eps
    exact = block_sparse.reference(
        x.double(), *packed, bias, residual, out_features=n, activation="relu"
    )
    assert relative(exact, wanted) < 1e-12


def test_nothing_stored_is_zero() -> None:
    packed = block_sparse.pack(torch.zeros(100, 200))
    assert packed.values.shape == (0, 64, 64)
    x, bias = torch.randn(3, 200), torch.randn(100)
    found = block_sparse.block_sparse_linear(x, *packed, bias, None, 100)
    assert torch.equal(found, bias.expand(3, 100))


def test_opcheck() -> None:
    packed = blocks(100, 200, 64, torch.float32)
    values = packed.values.requires_grad_()
    args = (torch.randn(3, 200, requires_grad=True), values, *packed[1:], None, None, 100)
    torch.library.opcheck(torch.ops.torchlathe.block_sparse_linear.default, args)


def test_gradients_are_those_of_the_dense_layer() -> None:
    n, k, size = 100, 200, 64
    packed = blocks(n, k, size, torch.float32)
    tensors = [torch.randn(2, 3, k), packed.values, torch.randn(n), torch.randn(2, 3, n)]
    x, values, bias, residual = (tensor.requires_grad_() for tensor in tensors)
    found = block_sparse.block_sparse_linear(x, values, *packed[1:], bias, residual, n)
    ours = torch.autograd.grad(found.square().sum(), (x, values, bias, residual))
    weight = block_sparse.dense(values, *packed[1:], k)[:n, :k]
    plain = (F.linear(x, weight, bias) + residual).square().sum()
    for one, other in zip(
        ours, torch.autograd.grad(plain, (x, values, bias, residual)), strict=True
    ):
        assert relative(one, other) < 1e-5  # fp32, in another order
    with pytest.raises(UnsupportedError, match="no backward through the fused activation"):
        block_sparse.block_sparse_linear(
            x, values, *packed[1:], None, None, n, "relu"
        ).sum().backward()


@pytest.mark.parametrize("size", [32, 100])
def test_other_blocks_are_refused(size: int) -> None:
    with pytest.raises(OptionError, match=f"no kernel for blocks of {size}"):
        block_sparse.pack(torch.ones(100, 100), size)


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("size", [64, 128])
def test_tiles(tokens: int, size: int) -> None:
    rows = 4096 // size
    tile = block_sparse.default_tile(tokens, rows, rows * rows // 5, size, 132)
    assert size == tile.BN
    assert min(tokens, 128) <= tile.BM
    assert tile.split >= 1
    # The stages fit the shared memory of sm_80 and sm_90.
    assert tile.stages * 2 * size * (size + tile.BM) <= 166_912 or tile.BM == 128
