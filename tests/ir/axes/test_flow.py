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
    "norms": lambda m, x: (
        x / (1 + x.norm(p=1, dim=-1, keepdim=True) + x.abs().norm(p=float("inf")))
    ),
    "cumulative": lambda m, x: x * x.cumsum(-1),
    "any": lambda m, x: x * (x > 1).any(-1, keepdim=True),
    "cosine similarity": lambda m, x: x * F.cosine_similarity(x, x.sin(), dim=-1)[:, None],
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
    "variance": lambda m, x: x * m.w / (1 + x.var(-1, keepdim=True)) + 0 * m.b,
    "biased variance": lambda m, x: x * m.w * x.var(-1, unbiased=False, keepdim=True) + 0 * m.b,
    "deviation": lambda m, x: x * m.w / x.std(-1, keepdim=True) + 0 * m.b,
    "deviation of everything": lambda m, x: x * m.w / x.std() + 0 * m.b,
    "deviation and mean": lambda m, x: (
        x * m.w * torch.std_mean(x, -1, keepdim=True)[1] / x.std(-1, keepdim=True) + 0 * m.b
    ),
    "maximum": lambda m, x: x * m.w * x.amax(-1, keepdim=True) + 0 * m.b,
    "maximum of what is never below zero": lambda m, x: (
        x * x.relu().amax(-1, keepdim=True) * m.w * m.b
    ),
    "minimum and its value": lambda m, x: x * m.w * x.min(-1, keepdim=True).values + 0 * m.b,
    "logsumexp": lambda m, x: x * m.w * x.logsumexp(-1, keepdim=True) + 0 * m.b,
    "global response norm": lambda m, x: (
        m.w * (x * x.abs() / (x.abs().mean(-1, keepdim=True) + 1e-3)) + m.b
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", CORRECTED.values(), ids=CORRECTED)
def test_exact_after_correction(function: Any) -> None:
    parameters = {n: nn.Parameter(torch.randn(WIDTH)) for n in ("w", "b")}
    program, family = between(function, **parameters)
    assert family.exactness == "exact-after-correction"
    assert family.zeroed_by == "writers"
    check_twice(program.copy())
    assert "still count" in family.reasons[0]
    check_by_erasing(program)


def check_twice(program: Any) -> None:
    """What a correction wrote into the graph can be corrected again."""
    passes = "structured-erase{sparsity=0.3},structured-erase{sparsity=0.3}"
    after = PassManager(passes, verify="full").run(program)
    for record in after.history[-2:]:
        assert record.changed
        assert record.verification["max_rel_error"] < 1e-12


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
    "median": (lambda m, x: x * x.median(-1, keepdim=True).values, "even zeros take part"),
    "product of all": (lambda m, x: x * x.prod(-1, keepdim=True), "even zeros take part"),
    "norm of negative order": (
        lambda m, x: x * x.norm(p=-1, dim=-1, keepdim=True), "norm of negative order"),
    "softmax": (lambda m, x: x.softmax(-1), "every index along this axis takes part"),
    "mean of a constant": (lambda m, x: x - x.cos().mean(-1, keepdim=True), "not zero"),
    "norm of what is not zero": (
        lambda m, x: F.layer_norm(x.sigmoid(), (WIDTH,)), "normalises over indices"),
}  # fmt: skip


# No writer of zeros makes these zero, but a layer whose columns are zero reads nothing of them.
READ = {
    "unknown": lambda m, x: x + x.relu().mean(-1, keepdim=True),
    "inverse": lambda m, x: 1 / x,
    "zero times infinity": lambda m, x: x * (1 / x),
    "zero by zero": lambda m, x: x / x,
    "logarithm": lambda m, x: x * x.abs().log(),
}


@pytest.mark.parametrize("function", READ.values(), ids=READ)
def test_exact_with_zeroed_readers(function: Any) -> None:
    program, family = between(function)
    assert family.exactness.startswith("exact")
    assert family.zeroed_by in ("readers", "all")
    assert family.reasons[0].startswith("equal to the model in which the slices that read")
    assert ("leave.weight", 1) in {(s.name, s.axis) for s in family.zeroed}
    check_by_erasing(program)


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

    for padding, exactness, zeroed in ((0, "exact-after-fold", "writers"), (1, "exact", "readers")):
        model = Net(run, enter=nn.Conv2d(3, 6, 1), leave=nn.Conv2d(6, 2, 3, padding=padding))
        program = tl.capture(model.double().eval(), (torch.randn(1, 3, 6, 6).double(),))
        family = program.analysis(ZeroInvariantGroups).by_name("enter.weight:0")
        assert (family.exactness, family.zeroed_by) == (exactness, zeroed)
        check_by_erasing(program)


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
    # One query head of each group: nothing zeroes the copies of v, so the output projection's
    # columns are zeroed, which are all that read it.
    assert repeat.extent == 2
    assert repeat.exactness == "exact"
    assert [(s.name, s.axis) for s in repeat.zeroed] == [("o.weight", 1)]
    check_by_erasing(program)


def test_join() -> None:
    assert join([ZERO, ZERO]) == ZERO
    assert join([ZERO, Value(1.0)]) == UNKNOWN
    assert join([ZERO, SINGULAR]) == SINGULAR
    assert ZERO.is_zero
    assert not UNKNOWN.is_zero
    assert not SINGULAR.is_zero


def test_active_dropout_is_no_constant() -> None:
    def verdict(function: Any) -> tuple[str, str]:
        _, family = between(function)
        return family.exactness, family.zeroed_by

    assert verdict(lambda m, x: F.dropout(x, 0.5, True)) == ("exact", "writers")
    assert verdict(lambda m, x: F.dropout(x.cos(), 0.5, True)) == ("exact", "readers")
    assert verdict(lambda m, x: F.alpha_dropout(x, 0.5, True)) == ("exact", "readers")
    assert verdict(lambda m, x: F.rrelu(x, training=True)) == ("exact", "writers")
    assert verdict(lambda m, x: F.rrelu(x.cos() - 2, training=True)) == ("exact", "readers")
