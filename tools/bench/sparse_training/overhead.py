"""What HESSO adds to a step of its base optimizer, in time and in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import torchlathe as tl
from torchlathe import optim
from torchlathe.passes import ZeroInvariantGroups

__all__ = ["overhead"]

WIDTH, HEADS, LAYERS = 384, 6, 12


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (m(y).reshape(shape).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.o(y)
        result: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return result


class Encoder(nn.Module):
    """Twelve layers of the width of MiniLM."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(32, WIDTH)
        self.layers = nn.Sequential(*(_Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of sequences (n, tokens, 32)."""
        result: Tensor = self.head(self.layers(self.enter(x)).mean(1))
        return result


def overhead(period: int = 50) -> dict[str, Any]:
    """Seconds of a step of AdamW alone and in HESSO, in turn, at each stage of two periods."""
    torch.manual_seed(0)
    model = Encoder()
    x = torch.randn(8, 32, 32)
    groups = tl.capture(model.eval(), (x,)).analysis(ZeroInvariantGroups)
    found: dict[str, Any] = {}
    bases: dict[str, dict[str, bool]] = {
        "default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}
    }  # fmt: skip
    for name, base_options in bases.items():
        sparse = optim.HESSO(
            groups, model, lr=1e-4, **base_options, target_sparsity=0.7, start_step=20,
            pruning_steps=2 * period, periods=2,
        )  # fmt: skip
        for _ in range(2):
            _backward(model, x)
            sparse.base.step()
        found[name] = _times(sparse, lambda: _backward(model, x))
    parameters = sum(p.numel() for p in model.parameters())
    return {**found, "parameters": parameters, "groups": sparse.table.count, **_memory(sparse)}


def _times(sparse: optim.HESSO, backward: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the base, and how many times as long a step takes at each stage."""
    rows: dict[str, list[tuple[float, float]]] = {}
    while not sparse.finished or len(rows.get("zero", ())) < sparse.start_step:
        stage = _stage(sparse)
        base, own = _time(sparse.base.step), _time(sparse.step)
        rows.setdefault(stage, []).append((base, own))
    whole = median(_time(backward) for _ in range(5))
    periods = [pair for name in ("choosing", "decay") for pair in rows[name]]
    pairs = [pair for found in rows.values() for pair in found]
    base = median(b for b, _ in pairs)
    return {
        "base_ms": 1e3 * base,
        "training_step_ms": 1e3 * (base + whole),
        **{stage: median(own / b for b, own in found) for stage, found in rows.items()},
        "periods": sum(own for _, own in periods) / sum(b for b, _ in periods),
    }


def _memory(sparse: optim.HESSO) -> dict[str, int]:
    """Bytes of what is prunable, of the copy while groups go, and of what is held throughout."""
    table = sparse.table
    tensors = {place.name: place.tensor for place in table.places}
    lasting = sum(
        f.owners.numel() * 8 + f.flat.numel() * f.flat.element_size()
        for f in table._factors.values()
    )
    return {
        "prunable_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "copy_bytes": sum(t.numel() * t.element_size() for t in table.remember().values()),
        "lasting_bytes": lasting,
    }


def _stage(sparse: optim.HESSO) -> str:
    now = sparse.steps - sparse.start_step
    if now < 0:
        return "before"
    if now >= sparse.pruning_steps:
        return "zero"
    return "choosing" if now % sparse.period_steps == 0 else "decay"


def _backward(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
