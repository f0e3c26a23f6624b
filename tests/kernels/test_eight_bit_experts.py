# mypy: disable-error-code="arg-type,assignment,call-arg,misc"
# Packed weights are tuples that are spread over arguments.
"""Experts with 8-bit weights, and where results go."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.making import eight_bits, relative, routed
from torchlathe.kernels.epilogue import interleave
from torchlathe.kernels.w4a16_experts import op as w4a16_experts
from torchlathe.kernels.w8a8_experts import op as w8a8_experts
from torchlathe.kernels.w8a16_experts import op as w8a16_experts

BRAIN, FP8 = torch.bfloat16, torch.float8_e4m3fn
COUNTS = [[3, 0, 5], [0, 0, 1], [17]]
N, K = 100, 200


def slot_by_slot(x, order, places, weights, counts, weight_of) -> torch.Tensor:
    """What an op means, one slot after another, in float64."""
    expert_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    wanted = torch.empty(sum(counts), N, dtype=torch.float64)
    for slot, expert in enumerate(expert_of.tolist()):
        product = F.silu(x[order[slot]].double() @ weight_of(expert).double().T)
        wanted[places[slot]] = product * weights[slot]
    return wanted


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_w8a16(counts: list[int], group: int) -> None:
    values = torch.randint(-127, 128, (len(counts), N, K), dtype=torch.int8)
    groups = 1 if group == 0 else 2
    scales = (torch.rand(len(counts), groups, N) * 0.01 + 0.001).to(BRAIN)
    weight = w8a16_experts.pack_experts(values, scales, group)
    offsets, x, order, places, weights = routed(counts, K, BRAIN)
    args = (x, order, offsets, *weight, weights, N, "silu", places)
    found = torch.ops.torchlathe.w8a16_experts_linear(*args)
    of = torch.arange(K) // (group or K)
    wanted = slot_by_slot(
        x, order, places, weights, counts, lambda e: values[e] * scales[e][of].T.double()
    )
    assert relative(found, wanted) < 3 * torch.finfo(BRAIN).eps
    options: dict[str, Any] = {"out_features": N, "activation": "silu", "places": places}
    exact = w8a16_experts.reference(x.double(), order, offsets, *weight, weights, **options)
    assert relative(exact, wanted) < 1e-6  # weights are dequantised in fp32


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_w8a8(counts: list[int], dtype: torch.dtype) -> None:
    values = eight_bits(len(counts) * N, K, dtype).view(len(counts), N, K)
    scales = torch.rand(len(counts), N) * 0.01 + 0.001
    weight = w8a8_experts.pack_experts(values, scales)
    offsets, x, order, places, weights = routed(counts, K, dtype)
    x_scales = torch.rand(x.shape[0])
    args = (x, x_scales, order, offsets, *weight, weights, N, torch.float32, "silu", places)
    found = torch.ops.torchlathe.w8a8_experts_linear(*args)
    wanted = slot_by_slot(
        x.double() * x_scales.double()[:, None],
        order,
        places,
        weights,
        counts,
        lambda e: values[e].double() * scales[e].double()[:, None],
    )
    assert relative(found, wanted) < 1e-5  # sums in fp32
    options: dict[str, Any] = {"out_features": N, "activation": "silu", "places": places}
    exact = w8a8_experts.reference(x, x_scales, order, offsets, *weight, weights, **options)
    assert relative(exact, wanted) < 1e-12


def test_a_gated_layer_of_experts() -> None:
    """The first half of a mixture's MLP in one op: gate, up and their product."""
    counts = [3, 0, 5]
    values = torch.randint(0, 16, (2, 3, N, K), dtype=torch.uint8)
    scales = (torch.rand(2, 3, 1, N) * 0.02 + 0.01).to(BRAIN)
    weight = w4a16_experts.pack_experts(
        interleave(*values, axis=1), interleave(*scales, axis=2), None, 0
    )
    offsets, x, order, _, _ = routed(counts, K, BRAIN)
    found = w4a16_experts.w4a16_experts_linear(x, order, offsets, *weight, None, N, 0, "swiglu")
    halves = (values.double() - 8) * scales.double().transpose(2, 3)
    expert_of = torch.arange(3).repeat_interleave(torch.tensor(counts))
    gate, up = ((x[order].double()[:, None] @ half[expert_of].mT)[:, 0] for half in halves)
    assert relative(found, F.silu(gate) * up) < 4 * torch.finfo(BRAIN).eps


def test_a_linear_layer_by_type_of_node() -> None:
    """Nodes are sorted by type, each type has weights, and results go back to the nodes."""
    types = torch.tensor([2, 0, 1, 0, 2, 2])
    order = types.argsort(stable=True)
    offsets = F.pad(torch.bincount(types, minlength=3).cumsum(0), (1, 0)).int()
    values = torch.randint(-127, 128, (3, N, K), dtype=torch.int8)
    scales = torch.rand(3, 1, N).to(BRAIN) * 0.01
    x = torch.randn(6, K).to(BRAIN)
    found = w8a16_experts.w8a16_experts_linear(
        x, order, offsets, *w8a16_experts.pack_experts(values, scales), None, N, "none", order
    )
    weights = values.double() * scales.double().mT
    wanted = torch.stack([x[i].double() @ weights[types[i]].T for i in range(6)])
    assert relative(found, wanted) < 3 * torch.finfo(BRAIN).eps


@pytest.mark.parametrize("kind", ["w8a16", "w8a8", "w4a16-fp16"])
def test_opcheck(kind: str) -> None:
    offsets, x, order, places, weights = routed(
        [2, 0, 4], K, {"w8a16": BRAIN, "w8a8": torch.int8}.get(kind, torch.float16)
    )
    if kind == "w4a16-fp16":
        values = torch.randint(0, 16, (3, N, K), dtype=torch.uint8)
        four = w4a16_experts.pack_experts(values, torch.rand(3, 1, N).half(), None, 0)
        args: Any = (x, order, offsets, *four, weights, N, 0, "silu", places)
        op = torch.ops.torchlathe.w4a16_experts_linear
    else:
        values = eight_bits(3 * N, K).view(3, N, K)
        if kind == "w8a16":
            eight = w8a16_experts.pack_experts(values, torch.rand(3, 1, N).to(BRAIN))
            args = (x, order, offsets, *eight, weights, N, "silu", places)
            op = torch.ops.torchlathe.w8a16_experts_linear
        else:
            rows = w8a8_experts.pack_experts(values, torch.rand(3, N))
            scales = torch.rand(x.shape[0])
            args = (x, scales, order, offsets, *rows, weights, N, BRAIN, "silu", places)
            op = torch.ops.torchlathe.w8a8_experts_linear
    torch.library.opcheck(op.default, args)
