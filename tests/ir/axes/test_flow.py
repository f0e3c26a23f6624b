"""What the flow says about tiny networks: exact, by which correction, or why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from tests.passes.test_families import Net
from torchlathe.ir.axes import UNKNOWN, ZERO, Value
from torchlathe.ir.axes.rule import SINGULAR, join
from torchlathe.passes import PassManager, ZeroInvariantGroups

WIDTH = 6


def between(function: Any, **modules: Any) -> Any:
    """A program with ``function`` between two linear layers, and the family between them."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(function(m, m.enter(x)))

    model = Net(run, enter=nn.Linear(4, WIDTH), leave=nn.Linear(WIDTH, 3), **modules)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    program = tl.capture(model.double().eval(), (torch.randn(2, 4).double(),))
    return program, program.analysis(ZeroInvariantGroups).of("enter.weight", 0)[0]


def check_by_erasing(program: Any) -> None:
    """The verifier compares with the zeroed model in float64."""
    after = PassManager("structured-erase{sparsity=0.5}", verify="full").run(program)
    assert after.history[-1].changed
    assert after.history[-1].verification["max_rel_error"] < 1e-12


EXACT = {
    "relu": lambda m, x: x.relu(),
    "gelu": lambda m, x: F.gelu(x),
    "silu": lambda m, x: F.silu(x),
    "tanh": lambda m, x: x.tanh(),
    "gated by a sigmoid": lambda m, x: x * x.sigmoid(),
    "shifted back": lambda m, x: x.sigmoid() - 0.5,
    "cosine less one": lambda m, x: x.cos() - 1,
    "product with anything": lambda m, x: x * (x.exp() + 3),
    "dropout": lambda m, x: F.dropout(x, 0.5, training=False),
    "residual": lambda m, x: x + x.relu(),
    "norm with eps": lambda m, x: F.normalize(x[..., None], dim=-1)[..., 0],
    "where": lambda m, x: torch.where(x > 0, x, 0.1 * x),
    "clamp": lambda m, x: x.clamp(-1, 1),
    "sum of squares": lambda m, x: x * x.square().sum(-1, keepdim=True).sqrt(),
}


@pytest.mark.parametrize("function", EXACT.values(), ids=EXACT)
def test_exact(function: Any) -> None:
    program, family = between(function)
    assert family.exactness == "exact"
    assert family.reasons == ()
    check_by_erasing(program)


def by_hand(m: Any, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * m.w + m.b


def unbiased(m: Any, x: Tensor) -> Tensor:
    var, _ = torch.var_mean(x + 0 * m.b, -1, keepdim=True)
    return x * m.w / var


CORRECTED = {
    "layer norm": lambda m, x: F.layer_norm(x, (WIDTH,), m.w, m.b),
    "rms norm": lambda m, x: F.rms_norm(x, (WIDTH,), m.w),
    "rms norm without weight": lambda m, x: F.rms_norm(x, (WIDTH,)) * m.w + 0 * m.b,
    "mean": lambda m, x: x * m.w - x * (x * m.b).mean(-1, keepdim=True),
    "rms by hand": lambda m, x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * m.w + 0 * m.b
    ),
    "layer norm by hand": by_hand,
    "unbiased variance": unbiased,
}  # fmt: skip


@pytest.mark.parametrize("function", CORRECTED.values(), ids=CORRECTED)
def test_exact_after_correction(function: Any) -> None:
    parameters = {n: nn.Parameter(torch.randn(WIDTH)) for n in ("w", "b")}
    program, family = between(function, **parameters)
    assert family.exactness == "exact-after-correction"
    assert "still count" in family.reasons[0]
    check_by_erasing(program)


FOLDED = {
    "sigmoid": (lambda m, x: x.sigmoid(), "0.5"),
    "softplus": (lambda m, x: F.softplus(x), "0.693147"),
    "cosine": (lambda m, x: x.cos(), "1"),
    "plus one": (lambda m, x: x.relu() + 1, "1"),
    "hard sigmoid": (lambda m, x: F.hardsigmoid(x), "0.5"),
}


@pytest.mark.parametrize(("function", "constant"), FOLDED.values(), ids=FOLDED)
def test_exact_after_fold(function: Any, constant: str) -> None:
    program, family = between(function)
    assert family.exactness == "exact-after-fold"
    assert f"the constant {constant} moves into the bias" in family.reasons[0]
    check_by_erasing(program)


APPROXIMATE = {
    "softmax": (lambda m, x: x.softmax(-1), "every index along this axis takes part"),
    "amax": (lambda m, x: x - x.amax(-1, keepdim=True), "even zeros take part"),
    "std": (lambda m, x: x / x.std(-1, keepdim=True), "even zeros take part"),
    "mean of a constant": (lambda m, x: x - x.cos().mean(-1, keepdim=True), "not zero"),
    "unknown": (lambda m, x: x + x.relu().mean(-1, keepdim=True), "sums over indices"),
    "norm of what is not zero": (
        lambda m, x: F.layer_norm(x.sigmoid(), (WIDTH,)), "normalises over indices"),
    "inverse": (lambda m, x: 1 / x, "sums over indices"),
    "zero times infinity": (lambda m, x: x * (1 / x), "sums over indices"),
    "zero by zero": (lambda m, x: x / x, "sums over indices"),
    "logarithm": (lambda m, x: x * x.abs().log(), "sums over indices"),
    "argmax": (lambda m, x: x + x.argmax(-1, keepdim=True), "even zeros take part"),
    "cumulative": (lambda m, x: x.cumsum(-1), "every index along this axis"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "reason"), APPROXIMATE.values(), ids=APPROXIMATE)
def test_approximate_with_its_reason(function: Any, reason: str) -> None:
    _, family = between(function)
    assert family.exactness == "approximate"
    assert any(reason in text for text in family.reasons), family.reasons
    assert "test_families.py" in family.reasons[0]  # where Net.forward is
    assert family.prunable  # on request


def test_a_padded_convolution_cannot_take_a_constant() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.leave(m.enter(x).sigmoid())

    for padding, exactness in ((0, "exact-after-fold"), (1, "approximate")):
        model = Net(run, enter=nn.Conv2d(3, 6, 1), leave=nn.Conv2d(6, 2, 3, padding=padding))
        program = tl.capture(model.eval(), (torch.randn(1, 3, 6, 6),))
        family = program.analysis(ZeroInvariantGroups).by_name("enter.weight:0")
        assert family.exactness == exactness


def test_squeeze_and_excite_is_exact() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.enter(x)
        gate = m.excite(m.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return m.leave(x * gate[:, :, None, None])

    model = Net(run, enter=nn.Conv2d(3, 6, 1), squeeze=nn.Linear(6, 4), excite=nn.Linear(4, 6),
                leave=nn.Conv2d(6, 2, 1))  # fmt: skip
    program = tl.capture(model.eval(), (torch.randn(2, 3, 4, 4),))
    families = program.analysis(ZeroInvariantGroups)
    # The mean is over positions, not over the channels.
    assert families.by_name("enter.weight:0").exactness == "exact"
    assert families.by_name("squeeze.weight:0").exactness == "exact"
    check_by_erasing(program)


def test_grouped_queries() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x).view(2, 3, 4, 2).transpose(1, 2)
        k = m.k(x).view(2, 3, 2, 2).transpose(1, 2)[:, :, None].expand(2, 2, 2, 3, 2)
        v = m.v(x).view(2, 3, 2, 2).transpose(1, 2)[:, :, None].expand(2, 2, 2, 3, 2)
        y = F.scaled_dot_product_attention(q, k.reshape(2, 4, 3, 2), v.reshape(2, 4, 3, 2))
        return m.o(y.transpose(1, 2).reshape(2, 3, 8))

    model = Net(run, q=nn.Linear(5, 8), k=nn.Linear(5, 4), v=nn.Linear(5, 4), o=nn.Linear(8, 5))
    program = tl.capture(model.double().eval(), (torch.randn(2, 3, 5).double(),))
    families = program.analysis(ZeroInvariantGroups)
    heads, repeat = families.by_name("q.weight:0/0"), families.by_name("q.weight:0/1")
    assert heads.exactness == "exact"
    assert {s.name for s in heads.slices} >= {"q.weight", "k.weight", "v.weight", "o.weight"}
    # One query head of each group: nothing zeroes the copies of v that it reads.
    assert repeat.extent == 2
    assert repeat.exactness == "approximate"
    check_by_erasing(program)


def test_join() -> None:
    assert join([ZERO, ZERO]) == ZERO
    assert join([ZERO, Value(1.0)]) == UNKNOWN
    assert join([ZERO, SINGULAR]) == SINGULAR
    assert ZERO.is_zero
    assert not UNKNOWN.is_zero
    assert not SINGULAR.is_zero
