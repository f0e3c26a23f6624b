"""reorder-linear: what it fuses is cheaper and the same, and it leaves alone what is not."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Error, Program
from torchlathe.ir.verifying import verify


def reordered(model: nn.Module, *inputs: torch.Tensor, spec: str = "reorder-linear") -> Program:
    """The program after the pass, held by the manager to being exact, and here to float64."""
    model = model.double().eval()
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    program = capture(model, tuple(wide), dynamic_shapes="auto")
    after = PassManager(spec).run(program)
    verify(after, "full")
    for scale in (1, 7):
        changed = [x * scale if x.is_floating_point() else x for x in wide]
        torch.testing.assert_close(
            after.run(*changed), program.run(*changed), rtol=1e-11, atol=1e-11
        )
    assert after.cost().flops_at() <= program.cost().flops_at()
    if "grow" not in spec:
        assert after.cost().parameters <= program.cost().parameters
    return after


def randomised(model: nn.Module) -> nn.Module:
    """With statistics of norms that are not the ones of a fresh model."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.2, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def ops(program: Program) -> list[str]:
    return [str(n.target).removeprefix("aten.") for n in program.nodes if n.op == "call_function"]


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "after a convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        ),
        (2, 3, 9, 9),
        ["conv2d.default", "relu.default"],
    ),
    "after a grouped convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)),
        (2, 4, 9),
        ["conv1d.default"],
    ),
    "after a linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False)),
        (4, 6),
        ["linear.default"],
    ),
    "before a linear layer": (
        lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8, bias=False)),
        (4, 6),
        ["linear.default"],
    ),
    "before a convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)),
        (2, 3, 7, 7),
        ["conv2d.default"],
    ),
    "before and after": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, dilation=2), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        ),
        (2, 3, 9, 9),
        ["conv2d.default"],
    ),
    "before a padded convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)),
        (2, 3, 7, 7),
        ["batch_norm.default", "conv2d.default"],
    ),
    "on another axis than the layer's": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5)),
        (4, 5, 6),
        ["linear.default", "batch_norm.default"],
    ),
    "two norms": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.ReLU()),
        (2, 3, 7, 7),
        ["batch_norm.default", "relu.default"],
    ),
}


@pytest.mark.parametrize("case", NORMS)
def test_norms(case: str) -> None:
    make, shape, wanted = NORMS[case]
    after = reordered(randomised(make()), torch.randn(shape))
    assert ops(after) == wanted


def test_a_folded_norm_leaves_the_names_of_the_layer() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    after = reordered(model, torch.randn(2, 3, 9, 9))
    assert set(after.parameters) == {"0.weight", "0.bias"}
    assert after.history[-1].statistics == {"fused": 2, "into": 1, "norms": 1, "heads": 0}


def test_a_norm_in_training_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    assert "batch_norm.default" in ops(reordered(model, torch.randn(6, 4)))


WIDTHS = st.lists(st.integers(1, 12), min_size=3, max_size=6)


@settings(max_examples=12)
@given(WIDTHS, st.lists(st.booleans(), min_size=5, max_size=5))
def test_chains_of_linear_layers_are_cut_where_it_is_cheapest(widths, biases) -> None:
    pairs = zip(widths, widths[1:], biases, strict=False)
    model = nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b, bias in pairs))
    after = reordered(model, torch.randn(3, widths[0]))
    # Every way to keep some of the widths between the ends, by brute force.
    inner = range(1, len(widths) - 1)
    best = min(
        sum(a * b for a, b in itertools.pairwise(kept))
        for chosen in range(2 ** len(inner))
        for kept in [[widths[0], *(widths[i] for i in inner if chosen >> (i - 1) & 1), widths[-1]]]
    )
    assert sum(after.tensor(n).numel() for n in after.parameters if "weight" in n) == best
    again = PassManager("reorder-linear").run(after)
    assert not again.history[-1].changed


def test_a_useful_bottleneck_stays_and_a_useless_one_goes() -> None:
    narrow = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    assert ops(reordered(narrow, torch.randn(2, 32))) == ["linear.default"] * 2
    wide = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.5), nn.Linear(64, 32))
    after = reordered(wide, torch.randn(2, 5, 32))
    assert ops(after).count("linear.default") == 1


def test_what_something_else_reads_stays() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 16)
            self.b = nn.Linear(16, 8)

    class Both(Pair):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            return self.b(y), y

    assert ops(reordered(Both(), torch.randn(2, 8))) == ["linear.default"] * 2

    class Twice(Pair):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.b(self.a(x))))

    assert ops(reordered(Twice(), torch.randn(2, 8))) == ["linear.default"] * 4


CONVOLUTIONS = {
    "then 1x1": (nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 4, 1), 1),
    "1x1 then 3x3": (nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 4, 3, padding=1), 1),
    "1x1 with a bias then 3x3": (nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 3), 1),
    "1x1 with a bias then a padded 3x3": (nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 3, padding=1), 2),
    "a narrow waist": (nn.Conv2d(16, 2, 3), nn.Conv2d(2, 16, 1), 2),
    "grouped": (nn.Conv2d(4, 16, 3, groups=2), nn.Conv2d(16, 4, 1), 2),
    "3x3 twice": (nn.Conv2d(4, 16, 3), nn.Conv2d(16, 4, 3), 2),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case: str) -> None:
    first, second, left = CONVOLUTIONS[case]
    x = torch.randn(2, first.in_channels, 9, 8)
    after = reordered(nn.Sequential(first, second), x)
    assert ops(after) == ["conv2d.default"] * left


def test_embedding_and_projection() -> None:
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 6))
    ids = torch.randint(0, 20, (2, 5))
    after = reordered(model, ids)  # 20 x 6 is less than 20 x 16
    assert ops(after) == ["embedding.default"]
    wide = nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 16))
    assert len(ops(reordered(wide, ids))) == 2
    grown = reordered(wide, ids, spec="reorder-linear{grow=true}")
    assert ops(grown) == ["embedding.default"]
    assert grown.cost().flops_at() == 0


def test_it_undoes_a_split_that_does_not_pay_and_leaves_one_that_does() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    program = capture(model, (torch.randn(2, 32),), dynamic_shapes="auto")
    after = PassManager("low-rank-split{method=svd,rank=8},reorder-linear").run(program)
    assert after.history[0].changed
    assert not after.history[1].changed


def test_a_resnet_loses_its_norms() -> None:
    import timm

    model = randomised(timm.create_model("resnet10t", num_classes=10))
    after = reordered(model, torch.randn(2, 3, 32, 32))
    assert "batch_norm.default" not in ops(after)
    assert after.history[-1].statistics["norms"] == sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )


def test_without_weights_it_says_so() -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)).eval(), torch.randn(2, 4)
    with pytest.raises(Error, match="needs the values of the weights"):
        PassManager("reorder-linear").run(capture(model, (x,)))


def test_float32_is_rounded_once() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).eval()
    x = torch.randn(2, 3, 9, 9)
    program = capture(model, (x,), dynamic_shapes="auto")
    after = PassManager("reorder-linear").run(program)
    found = after.history[-1].verification
    assert found["passed"]
    assert found["max_rel_error"] < 1e-6  # the rounding of the new weights
    assert after.tensor("0.weight").dtype == torch.float32


# -- attention with one head -----------------------------------------------------------------------


class Attention(nn.Module):
    """Attention as models write it: directly, or with an axis for heads; with or without a mask."""

    def __init__(self, width: int = 12, inner: int = 12, heads: int = 0, *, bias: bool) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, inner), nn.Linear(width, inner)
        self.value = nn.Linear(width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.heads:
            q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.heads:
            mixed = mixed.transpose(1, 2).flatten(2)
        return x + self.out(mixed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inner", "heads"), [(12, 0), (12, 1), (20, 0)])
def test_the_output_projection_of_one_head_goes_into_its_values(
    inner: int, heads: int, bias: bool
) -> None:
    after = reordered(Attention(inner=inner, heads=heads, bias=bias), torch.randn(2, 5, 12))
    assert after.history[-1].statistics["heads"] == 1
    assert ops(after).count("linear.default") == 3
    assert after.tensor("value.fused_weight").shape == (12, 12)
    assert "value.weight" not in after.entries


@pytest.mark.parametrize(("inner", "heads"), [(12, 2), (8, 0), (20, 1)])
def test_it_stays_where_that_would_be_more_work(inner: int, heads: int) -> None:
    """Several heads, a narrow value, and views that say a width which would change."""
    after = reordered(Attention(inner=inner, heads=heads, bias=True), torch.randn(2, 5, 12))
    assert not after.history[-1].changed


def test_fully_masked_rows_stay_what_they_were() -> None:
    class Masked(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)  # the first row sees nothing
            parts = (self.query(x), self.key(x), self.value(x))
            return self.out(nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask))

    after = reordered(Masked(bias=True), torch.randn(2, 5, 12))
    assert after.history[-1].statistics["heads"] == 1
