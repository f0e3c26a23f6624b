"""Ops that are not a plain layer, with random data: what gpu_check holds to float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.block_sparse import op as block_sparse
from torchlathe.kernels.blocks.launching import pad_rank
from torchlathe.kernels.convolution import op as convolution
from torchlathe.kernels.dequantize import op as dequantize
from torchlathe.kernels.embedding import op as embedding
from torchlathe.kernels.epilogue import rows_for
from torchlathe.kernels.low_rank import op as low_rank
from torchlathe.kernels.norm_quantise import op as norm
from torchlathe.kernels.semi_structured import op as semi_structured
from torchlathe.kernels.w4a8 import op as w4a8
from torchlathe.kernels.w4a16 import op as w4a16
from torchlathe.kernels.w4a16_experts import op as w4a16_experts
from torchlathe.kernels.w8a8 import op as w8a8
from torchlathe.kernels.w8a8_experts import op as w8a8_experts
from torchlathe.kernels.w8a16 import op as w8a16
from torchlathe.kernels.w8a16_experts import op as w8a16_experts

__all__ = ["FURTHER", "Case", "block_mask", "routing"]

_RANK = 24
_EXPERTS = 5
BRAIN, HALF, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        found: Calls the op.
        wanted: Its meaning in float64.
        tolerance: Largest relative error: sums are fp32, results fp16 or bf16.
    """

    found: Callable[[], Tensor]
    wanted: Callable[[], Tensor]
    tolerance: float

    def error(self) -> float:
        """Relative error of the op."""
        wanted = self.wanted()
        found = self.found().to(torch.float64)
        return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _eight(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
    return (torch.randn(rows, columns, device=device) * 50).to(dtype)


def _four(n: int, k: int, device: torch.device, dtype: torch.dtype) -> w4a16.W4:
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = (torch.rand(-(-k // 128), n, device=device) * 0.02 + 0.01).to(dtype)
    return w4a16.pack(values, scales, None, 128)


def _w4a16_gated(m: int, n: int, k: int, device: torch.device) -> Case:
    weight = _four(rows_for(n, "swiglu"), k, device, HALF)
    x = torch.randn(m, k, device=device).half() / k**0.5
    end = {"out_features": n, "group": 128, "activation": "swiglu"}
    return Case(
        lambda: w4a16.w4a16_linear(x, *weight, None, None, n, 128, "swiglu"),
        lambda: w4a16.reference(x.double(), *weight, **end),  # type: ignore[arg-type]
        2e-3,
    )


def _w8a8_gated(m: int, n: int, k: int, device: torch.device) -> Case:
    rows = rows_for(n, "swiglu")
    weight = w8a8.pack(_eight(rows, k, device, torch.int8), torch.rand(rows, device=device) * 1e-3)
    x, x_scales = _eight(m, k, device, torch.int8), torch.rand(m, device=device) * 1e-2
    return Case(
        lambda: w8a8.w8a8_linear(x, x_scales, *weight, None, None, n, BRAIN, "swiglu"),
        lambda: w8a8.reference(x, x_scales, *weight, out_features=n, activation="swiglu"),
        4e-3,
    )


def _factors(n: int, k: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    down = torch.randn(_RANK, k, device=device).to(dtype) / 64
    return pad_rank(down, torch.randn(n, _RANK, device=device).to(dtype) / 8)


def _w4a16_low_rank(m: int, n: int, k: int, device: torch.device) -> Case:
    weight, (down, up) = _four(n, k, device, HALF), _factors(n, k, device, HALF)
    x = torch.randn(m, k, device=device).half()

    def wanted() -> Tensor:
        plain = w4a16.reference(x.double(), *weight, out_features=n, group=128)
        return plain + x.double() @ down.double().T @ up[:n].double().T

    return Case(
        lambda: w4a16.w4a16_low_rank_linear(x, *weight, down, up, None, None, n, 128), wanted, 2e-3
    )


def _w8a16_low_rank(m: int, n: int, k: int, device: torch.device) -> Case:
    values = _eight(n, k, device, torch.int8)
    weight = w8a16.pack(values, torch.rand(1, n, device=device).half() * 1e-3 + 1e-3)
    down, up = _factors(n, k, device, HALF)
    x = torch.randn(m, k, device=device).half()

    def wanted() -> Tensor:
        plain = w8a16.reference(x.double(), *weight, out_features=n)
        return plain + x.double() @ down.double().T @ up[:n].double().T

    return Case(
        lambda: w8a16.w8a16_low_rank_linear(x, *weight, down, up, None, None, n), wanted, 2e-3
    )


def _w8a8_low_rank(m: int, n: int, k: int, device: torch.device) -> Case:
    scales = torch.rand(n, device=device) * 1e-3
    weight = w8a8.pack(_eight(n, k, device, torch.int8), scales)
    x, x_scales = _eight(m, k, device, torch.int8), torch.rand(m, device=device) * 1e-2
    up = _factors(n, k, device, BRAIN)[1]
    narrow = torch.randn(m, up.shape[1], device=device).to(BRAIN)

    def wanted() -> Tensor:
        plain = w8a8.reference(x, x_scales, *weight, out_features=n)
        return plain + narrow.double() @ up[:n].double().T

    return Case(
        lambda: w8a8.w8a8_low_rank_linear(
            x, x_scales, *weight, narrow, up, None, None, n, BRAIN, "none"
        ),
        wanted,
        8e-3,
    )


def _w4a8_low_rank(m: int, n: int, k: int, device: torch.device) -> Case:
    values = torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device)
    weight = w4a8.pack(values, torch.rand(1, n, device=device) * 1e-2)
    x, x_scales = _eight(m, k, device, torch.int8), torch.rand(m, device=device) * 1e-2
    up = _factors(n, k, device, BRAIN)[1]
    narrow = torch.randn(m, up.shape[1], device=device).to(BRAIN)

    def wanted() -> Tensor:
        plain = w4a8.reference(x, x_scales, *weight, out_features=n)
        return plain + narrow.double() @ up[:n].double().T

    return Case(
        lambda: w4a8.w4a8_low_rank_linear(
            x, x_scales, *weight, narrow, up, None, None, n, BRAIN, "none"
        ),
        wanted,
        8e-3,
    )


def _w4a8_zeros(m: int, n: int, k: int, device: torch.device) -> Case:
    groups = -(-k // 128)
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8, device=device)
    weight = w4a8.pack_centred(values, torch.rand(groups, n, device=device) * 1e-2, zeros, 128)
    x, x_scales = _eight(m, k, device, torch.int8), torch.rand(m, device=device) * 1e-2
    return Case(
        lambda: w4a8.w4a8_linear(
            x, x_scales, *weight[:2], None, None, n, BRAIN, "none", weight.zeros
        ),
        lambda: w4a8.reference(x, x_scales, *weight, out_features=n),
        4e-3,
    )


def _w4a8_fp8(m: int, n: int, k: int, device: torch.device) -> Case:
    values = torch.randint(-7, 8, (n, k), dtype=torch.int8, device=device)
    weight = w4a8.pack(values, torch.rand(1, n, device=device) * 1e-2, 0, FP8)
    x, x_scales = _eight(m, k, device, FP8), torch.rand(m, device=device) * 1e-2
    return Case(
        lambda: w4a8.w4a8_linear(x, x_scales, *weight, None, None, n, BRAIN),
        lambda: w4a8.reference(x, x_scales, *weight, out_features=n),
        4e-3,
    )


def _w4a16_as(
    dtype: torch.dtype, group: int, zeros: bool
) -> Callable[[int, int, int, torch.device], Case]:
    """Other types, groups and zero points than those that the layers of the benchmark have."""

    def case(m: int, n: int, k: int, device: torch.device) -> Case:
        groups = 1 if group == 0 else -(-k // group)
        values = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        scales = (torch.rand(groups, n, device=device) * 0.02 + 0.01).to(dtype)
        shape, few = (groups, n), torch.uint8
        points = torch.randint(0, 16, shape, dtype=few, device=device) if zeros else None
        weight = w4a16.pack(values, scales, points, group)
        x = torch.randn(m, k, device=device).to(dtype)
        return Case(
            lambda: w4a16.w4a16_linear(x, *weight, None, None, n, group),
            lambda: w4a16.reference(x.double(), *weight, out_features=n, group=group),
            8e-3 if dtype == BRAIN else 1e-3,
        )

    return case


def _w8a16_brain(m: int, n: int, k: int, device: torch.device) -> Case:
    scales = torch.rand(-(-k // 128), n, device=device).to(BRAIN) * 1e-3 + 1e-3
    weight = w8a16.pack(_eight(n, k, device, torch.int8), scales, 128)
    x = torch.randn(m, k, device=device).to(BRAIN)
    return Case(
        lambda: w8a16.w8a16_linear(x, *weight, None, None, n),
        lambda: w8a16.reference(x.double(), *weight, out_features=n),
        8e-3,
    )


def _norm(mean: bool, dtype: torch.dtype) -> Callable[[int, int, int, torch.device], Case]:
    """A norm of a sum; what is compared is numbers times scales."""

    def case(m: int, n: int, k: int, device: torch.device) -> Case:
        x, residual = (torch.randn(m, k, device=device).to(BRAIN) for _ in range(2))
        weight, bias = torch.rand(k, device=device), torch.randn(k, device=device)
        own = bias if mean else None

        def found() -> Tensor:
            numbers, scales, _ = norm.add_norm_quantise(x, residual, weight, own, 1e-6, mean, dtype)
            return numbers.to(torch.float64) * scales.to(torch.float64)[:, None]

        def wanted() -> Tensor:
            total = (x.float() + residual.float()).to(BRAIN).double()
            numbers, scales = norm.reference(total, weight, own, 1e-6, mean=mean, dtype=dtype)
            return numbers.to(torch.float64) * scales.to(torch.float64)[:, None]

        # A value at the middle between two numbers may go to either: a step, of a few of them.
        return Case(found, wanted, 2e-2 if dtype == FP8 else 4e-3)

    return case


def _rows_as_they_are(m: int, n: int, k: int, device: torch.device) -> Case:
    x = torch.randn(m, k, device=device).to(BRAIN)

    def found() -> Tensor:
        numbers, scales = dequantize.quantize_tokens(x, "int8")
        return numbers.to(torch.float64) * scales.to(torch.float64)[:, None]

    def wanted() -> Tensor:
        numbers, scales = dequantize.quantize_tokens(x.cpu(), "int8")
        return (numbers.to(torch.float64) * scales.to(torch.float64)[:, None]).to(device)

    return Case(found, wanted, 4e-3)


def _convolution(m: int, n: int, k: int, device: torch.device) -> Case:
    channels, side = max(8, min(k // 8, 64)), 9
    values = torch.randint(-127, 128, (n, channels, 3, 3), dtype=torch.int8, device=device)
    scales = torch.rand(n, device=device) * 1e-3
    x = torch.randint(-127, 128, (m, channels, side, side), dtype=torch.int8, device=device)
    x_scales = torch.rand(m, device=device) * 1e-2
    weight = convolution.pack_conv(values, scales)
    sizes = ([3, 3], [2, 2], [1, 1], [1, 1])
    return Case(
        lambda: convolution.w8a8_conv2d(x, x_scales, *weight, None, *sizes, n, BRAIN),
        lambda: convolution.reference(x, x_scales, values, scales, stride=2, padding=1),
        4e-3,
    )


def _embedding(m: int, n: int, k: int, device: torch.device) -> Case:
    values = torch.randint(0, 256, (n, -(-k // 2)), dtype=torch.uint8, device=device)
    args = (values, torch.rand(n, 1, device=device) + 0.1, None, None)
    columns = 2 * values.shape[1]
    indices = torch.randint(0, n, (m,), device=device)
    return Case(
        lambda: embedding.quantised_embedding(indices, *args, columns, 0, "int4", BRAIN),
        lambda: embedding.reference(indices, *args, columns=columns, group=0, format="int4"),
        4e-3,
    )


def _semi_structured(m: int, n: int, k: int, device: torch.device) -> Case:
    weight = torch.randn(n, k // 4, 4, device=device)
    weight[..., 1:3] = 0
    weight = weight.flatten(1).to(HALF)
    x = torch.randn(m, weight.shape[1], device=device).to(HALF)
    return Case(
        lambda: semi_structured.semi_structured_linear(x, weight, None, None, None, n),
        lambda: semi_structured.reference(x.double(), weight, out_features=n),
        1e-3,
    )


def block_mask(n: int, k: int, size: int, share: float, device: torch.device) -> Tensor:
    """A mask, (n, k), that keeps a share of the blocks."""
    kept = torch.rand(-(-n // size), -(-k // size), device=device) < share
    kept[0, 0] = True
    return kept.repeat_interleave(size, 0).repeat_interleave(size, 1)[:n, :k]


def _block_sparse(size: int) -> Callable[[int, int, int, torch.device], Case]:
    def case(m: int, n: int, k: int, device: torch.device) -> Case:
        mask = block_mask(n, k, size, 0.3, device)
        weight = block_sparse.pack((torch.randn(n, k, device=device) * mask).to(BRAIN), size)
        x = torch.randn(m, k, device=device).to(BRAIN)
        return Case(
            lambda: block_sparse.block_sparse_linear(x, *weight, None, None, n),
            lambda: block_sparse.reference(x.double(), *weight, out_features=n),
            8e-3,
        )

    return case


def _low_rank(m: int, n: int, k: int, device: torch.device) -> Case:
    factors = low_rank.pack(
        torch.randn(_RANK, k, device=device).to(BRAIN) / 64,
        torch.randn(n, _RANK, device=device).to(BRAIN) / 8,
    )
    x, bias = torch.randn(m, k, device=device).to(BRAIN), torch.randn(n, device=device).to(BRAIN)
    return Case(
        lambda: low_rank.low_rank_linear(x, *factors, bias, None, n),
        lambda: low_rank.reference(x.double(), *factors, bias, out_features=n),
        8e-3,
    )


def routing(slots: int, experts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets of experts that take about as many slots each, and a permutation of the slots."""
    expert = torch.arange(slots, device=device) % experts
    counts = torch.bincount(expert, minlength=experts)
    return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32), torch.randperm(slots, device=device)


def _experts(kind: str) -> Callable[[int, int, int, torch.device], Case]:
    def case(m: int, n: int, k: int, device: torch.device) -> Case:
        offsets, places = routing(2 * m, _EXPERTS, device)
        order = torch.arange(2 * m, device=device) % m
        weights = torch.rand(2 * m, device=device)
        if kind == "w4a16":
            values = torch.randint(0, 16, (_EXPERTS, n, k), dtype=torch.uint8, device=device)
            scales = torch.rand(_EXPERTS, -(-k // 128), n, device=device).to(BRAIN) * 0.02
            four = w4a16_experts.pack_experts(values, scales, None, 128)
            x = torch.randn(m, k, device=device).to(BRAIN)
            return Case(
                lambda: w4a16_experts.w4a16_experts_linear(
                    x, order, offsets, *four, weights, n, 128, "none", places
                ),
                lambda: w4a16_experts.reference(
                    x.double(), order, offsets, *four, weights, out_features=n, group=128,
                    places=places,
                ),
                8e-3,
            )  # fmt: skip
        values = _eight(_EXPERTS * n, k, device, torch.int8).view(_EXPERTS, n, k)
        if kind == "w8a16":
            scales = torch.rand(_EXPERTS, 1, n, device=device).to(BRAIN) * 1e-3
            eight = w8a16_experts.pack_experts(values, scales)
            x = torch.randn(m, k, device=device).to(BRAIN)
            return Case(
                lambda: w8a16_experts.w8a16_experts_linear(
                    x, order, offsets, *eight, weights, n, "none", places
                ),
                lambda: w8a16_experts.reference(
                    x.double(), order, offsets, *eight, weights, out_features=n, places=places
                ),
                8e-3,
            )
        rows = w8a8_experts.pack_experts(values, torch.rand(_EXPERTS, n, device=device) * 1e-3)
        x, x_scales = _eight(m, k, device, torch.int8), torch.rand(m, device=device)
        return Case(
            lambda: w8a8_experts.w8a8_experts_linear(
                x, x_scales, order, offsets, *rows, weights, n, BRAIN, "none", places
            ),
            lambda: w8a8_experts.reference(
                x, x_scales, order, offsets, *rows, weights, out_features=n, places=places
            ),
            8e-3,
        )

    return case


# Builders by name: (tokens, output features, input features, device).
FURTHER: dict[str, Callable[[int, int, int, torch.device], Case]] = {
    "w4a16 gated": _w4a16_gated,
    "w8a8 gated": _w8a8_gated,
    "w4a16_low_rank": _w4a16_low_rank,
    "w8a16_low_rank": _w8a16_low_rank,
    "w8a8_low_rank": _w8a8_low_rank,
    "w4a8_low_rank": _w4a8_low_rank,
    "w4a8 zero points": _w4a8_zeros,
    "w4a8 fp8": _w4a8_fp8,
    "block_sparse 64": _block_sparse(64),
    "block_sparse 128": _block_sparse(128),
    "low_rank": _low_rank,
    "w4a16_experts": _experts("w4a16"),
    "w8a16_experts": _experts("w8a16"),
    "w8a8_experts": _experts("w8a8"),
    "w4a16 bf16 zero points": _w4a16_as(BRAIN, 128, zeros=True),
    "w4a16 groups of 64": _w4a16_as(HALF, 64, zeros=True),
    "w4a16 bf16 groups of 32": _w4a16_as(BRAIN, 32, zeros=False),
    "w4a16 whole rows": _w4a16_as(HALF, 0, zeros=False),
    "w8a16 bf16 groups": _w8a16_brain,
    "rms_norm_quantise": _norm(mean=False, dtype=torch.int8),
    "layer_norm_quantise": _norm(mean=True, dtype=torch.int8),
    "rms_norm_quantise fp8": _norm(mean=False, dtype=FP8),
    "quantize_tokens": _rows_as_they_are,
    "w8a8_conv2d": _convolution,
    "quantised_embedding": _embedding,
    "semi_structured": _semi_structured,
}
