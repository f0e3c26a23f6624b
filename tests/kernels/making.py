"""Quantised layers with random values, for the tests of the kernels."""

import torch
from torch import Tensor

from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a16 import op as w8a16


def w4(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype) -> w4a16.W4:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = (torch.rand(groups, n) * 0.05 + 0.01).to(dtype)
    points = torch.randint(0, 16, (groups, n), dtype=torch.uint8) if zeros else None
    return w4a16.pack(values, scales, points, group)


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error's norm over the norm of what is wanted."""
    return float(
        (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    )


def w8(n: int, k: int, group: int, dtype: torch.dtype) -> w8a16.W8:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return w8a16.pack(values, (torch.rand(groups, n) * 0.01 + 0.001).to(dtype), group)


def w4_signed(n: int, k: int, group: int) -> w4a8.W4Signed:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    return w4a8.pack(values, torch.rand(groups, n) * 0.05 + 0.01, group)


def w8_rows(n: int, k: int, dtype: torch.dtype = torch.int8) -> w8a8.W8Rows:
    return w8a8.pack(eight_bits(n, k, dtype), torch.rand(n) * 0.01 + 0.001)


def eight_bits(m: int, k: int, dtype: torch.dtype = torch.int8) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (m, k), dtype=torch.int8)
    return (torch.randn(m, k) * 50).to(dtype)


def w4_centred(n: int, k: int, group: int) -> w4a8.W4Centred:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8)
    return w4a8.pack_centred(values, torch.rand(groups, n) * 0.05 + 0.01, zeros, group)


def w4_for_floats(n: int, k: int, group: int) -> w4a8.W4Signed:
    groups = 1 if group == 0 else -(-k // group)
    values = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    scales = torch.rand(groups, n) * 0.05 + 0.01
    return w4a8.pack(values, scales, group, torch.float8_e4m3fn)


def blocks(n: int, k: int, size: int, dtype: torch.dtype, share: float = 0.4):
    """A weight of which a share of the blocks is kept, the first row of blocks empty."""
    from torchlathe.kernels.block_sparse import op as block_sparse

    rows, columns = -(-n // size), -(-k // size)
    kept = torch.rand(rows, columns) < share
    kept[0] = False
    kept[-1, -1] = True
    mask = kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :k]
    return block_sparse.pack((torch.randn(n, k) * mask).to(dtype), size)


def routed(counts: list[int], k: int, dtype: torch.dtype):
    """Offsets, tokens, the token of each slot, a row of the result for each, and weights."""
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    slots = int(offsets[-1])
    tokens = max(1, slots // 2)
    x = eight_bits(tokens, k, dtype) if dtype.itemsize == 1 else torch.randn(tokens, k).to(dtype)
    order = torch.randint(0, tokens, (slots,))
    return offsets, x, order, torch.randperm(slots), torch.rand(slots)
