from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.making import relative
from torchlathe.kernels.w4a16.op import dequantised
from torchlathe.kernels.w4a16_experts import op

experts: Any = op  # weights are passed by unpacking, which a checker cannot count

counts_of_experts = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@given(counts_of_experts, st.sampled_from([2, 8, 16, 32]))
def test_blocks_cover_each_slot_once(counts: list[int], BM: int) -> None:
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    slots = int(offsets[-1])
    blocks = experts.token_blocks(offsets, BM, slots, len(counts))
    assert blocks.dtype == torch.int32
    seen = []
    for expert, first, last in blocks.tolist():
        assert last - first <= BM
        for slot in range(first, last):
            assert offsets[expert] <= slot < offsets[expert + 1]
            seen.append(slot)
    assert seen == list(range(slots))


def layer(counts, n, k, group, zeros, dtype) -> tuple[Any, ...]:
    count = len(counts)
    values = torch.randint(0, 16, (count, n, k), dtype=torch.uint8)
    groups = 1 if group == 0 else -(-k // group)
    scales = (torch.rand(count, groups, n) * 0.05 + 0.01).to(dtype)
    points = torch.randint(0, 16, (count, groups, n), dtype=torch.uint8) if zeros else None
    weight = experts.pack_experts(values, scales, points, group)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    slots = int(offsets[-1])
    tokens = max(1, slots // 2)
    order = torch.randint(0, tokens, (slots,))
    return weight, offsets, torch.randn(tokens, k).to(dtype), order, torch.rand(slots)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("gathered", [False, True], ids=["plain", "gathered"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0, 1], [17]], ids=str)
def test_op_on_a_cpu(counts: list[int], gathered: bool, dtype: torch.dtype) -> None:
    n, k, group = 100, 200, 64
    weight, offsets, x, order, weights = layer(counts, n, k, group, True, dtype)
    if not gathered:
        x, order = torch.randn(sum(counts), k).to(dtype), None
    found = experts.w4a16_experts_linear(x, order, offsets, *weight, weights, n, group, "silu")
    wanted = torch.empty(sum(counts), n, dtype=torch.float64)
    slots = x if order is None else x[order]
    expert_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for slot, expert in enumerate(expert_of.tolist()):
        w = dequantised(weight.words[expert], weight.scales[expert], weight.zeros[expert], group)[
            :n, :k
        ].double()
        wanted[slot] = torch.nn.functional.silu(slots[slot].double() @ w.T) * weights[slot]
    assert relative(found, wanted) < 3 * torch.finfo(dtype).eps
    exact = experts.reference(
        x.double(), order, offsets, *weight, weights, out_features=n, group=group, activation="silu"
    )
    assert relative(exact, wanted) < 1e-6


def test_opcheck() -> None:
    weight, offsets, x, order, weights = layer([2, 0, 4], 96, 128, 128, False, torch.bfloat16)
    args = (x, order, offsets, *weight, weights, 96, 128, "relu")
    torch.library.opcheck(torch.ops.torchlathe.w4a16_experts_linear.default, args)
