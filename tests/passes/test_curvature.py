"""Products, spectra and traces against dense matrices in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchlathe.ir import InputError, OptionError, PreconditionError, Program, capture
from torchlathe.passes import PassContext
from torchlathe.passes.analysis.curvature import (
    Objective,
    Products,
    TraceEstimate,
    dense,
    eigenvalues,
    erase_delta,
    low_rank_delta,
    quantise_delta,
    tie_delta,
)
from torchlathe.passes.analysis.curvature.outputs import OutputHessian

Batch = tuple[torch.Tensor, torch.Tensor]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(4, 12), nn.Linear(4, 3), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.out(self.norm(x + y).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3))


def conv() -> nn.Module:
    layers = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "conv": (conv, (1, 5, 5)),
    "attention": (Attending, (3, 4)),
}


def cross_entropy(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


def squared(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    return (outputs - F.one_hot(batch[1], 3)).square().sum(1).mean()


LOSSES = {"ce": cross_entropy, "mse": squared}


def problem(
    make: Callable[[], nn.Module], shape: tuple[int, ...], loss: Any = cross_entropy
) -> tuple[Program, PassContext]:
    """A net in float64 with two batches of six."""
    torch.manual_seed(1)
    model = make().double().eval()
    batches = [(torch.randn(6, *shape).double(), torch.randint(3, (6,))) for _ in range(2)]
    program = capture(model, (batches[0][0],))
    return program, PassContext(program, "test", batches, loss)


def true_hessian(objective: Objective) -> torch.Tensor:
    """By torch.autograd.functional, from one flat vector of all parameters."""
    values = objective.parameters()

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([v.numel() for v in values.values()])
        moved = {n: p.reshape(values[n].shape) for n, p in zip(values, pieces, strict=True)}
        found = []
        for batch in objective:
            with objective.running(batch):
                found.append(objective.loss(moved, batch))
        return torch.stack(found).mean()

    flat = torch.cat([v.flatten() for v in values.values()])
    return torch.autograd.functional.hessian(loss, flat)


def true_gauss_newton(objective: Objective) -> torch.Tensor:
    """``J' H J`` of each batch, with all three written out."""
    values = objective.parameters()
    total: Any = 0.0
    for batch in objective:
        with objective.running(batch):

            def run(flat: torch.Tensor, batch: Any = batch) -> torch.Tensor:
                pieces = flat.split([v.numel() for v in values.values()])
                moved = {n: p.reshape(values[n].shape) for n, p in zip(values, pieces, strict=True)}
                return objective.outputs(moved, batch)[0].flatten()

            flat = torch.cat([v.flatten() for v in values.values()])
            outputs = run(flat).detach()
            jacobian = torch.autograd.functional.jacobian(run, flat)
            inner = torch.autograd.functional.hessian(
                lambda z, b=batch: objective.loss_from([z.reshape(6, 3)], b), outputs
            )
        total = total + jacobian.T @ inner @ jacobian
    return total / 2


# float64 throughout: what differs is the order of summation, over at most some hundred terms.
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_products_are_those_of_the_dense_hessian(net: str, loss: str) -> None:
    program, ctx = problem(*NETS[net], LOSSES[loss])
    objective = Objective(program, ctx)
    true = true_hessian(objective)
    for mode in ("reverse", "forward"):
        products = Products(objective, "hessian", mode)
        found = dense(products.each, objective.parameters())
        torch.testing.assert_close(found, true, **CLOSE)
        torch.testing.assert_close(found, found.T, **CLOSE)
        assert products.mode == mode  # nothing fell back
    assert not ctx.diagnostics


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_gauss_newton_products_are_those_of_the_dense_matrix(net: str, loss: str) -> None:
    program, ctx = problem(*NETS[net], LOSSES[loss])
    objective = Objective(program, ctx)
    true = true_gauss_newton(objective)
    forward, pulled = Products(objective, "ggn"), Products(objective, "ggn")
    pulled.mode = "reverse"  # as after an op without a forward rule
    for products in (forward, pulled):
        found = dense(products.each, objective.parameters())
        torch.testing.assert_close(found, true, **CLOSE)
    assert torch.linalg.eigvalsh(true)[0] > -1e-12  # the losses are convex in the outputs


def test_gauss_newton_is_the_hessian_of_a_linear_model_with_squared_errors() -> None:
    program, ctx = problem(lambda: nn.Linear(4, 3), (4,), squared)
    objective = Objective(program, ctx)
    like = objective.parameters()
    hessian, gauss_newton = Products(objective, "hessian"), Products(objective, "ggn")
    torch.testing.assert_close(dense(hessian.each, like), dense(gauss_newton.each, like), **CLOSE)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_a_direction_alone_is_cheaper_and_the_same(matrix: Any) -> None:
    program, ctx = problem(*NETS["mlp"])
    objective = Objective(program, ctx)
    products = Products(objective, matrix)
    vector = {n: torch.randn_like(t) for n, t in objective.parameters().items()}
    along = products.along(vector)
    product = products(vector)
    second = sum(float((product[n] * vector[n]).sum()) for n in vector)
    assert sum(along.second) / 2 == pytest.approx(second, rel=1e-9)
    step = 1e-6
    moved = [objective.value({n: s * v for n, v in vector.items()}) for s in (step, -step)]
    slope = (moved[0] - moved[1]) / (2 * step)  # with an error of step^2 and rounding of 1e-10
    assert sum(along.first) / 2 == pytest.approx(slope, rel=1e-6)


def test_products_with_some_parameters_are_blocks() -> None:
    program, ctx = problem(*NETS["mlp"])
    objective = Objective(program, ctx, ["0.weight", "3.bias"])
    whole = Objective(program, ctx)
    places = torch.cat(
        [torch.full((t.numel(),), n in objective.names) for n, t in whole.parameters().items()]
    ).bool()
    block = dense(Products(objective).each, objective.parameters())
    torch.testing.assert_close(block, true_hessian(whole)[places][:, places], **CLOSE)


def test_eigenvalues_are_those_of_the_dense_matrix() -> None:
    program, ctx = problem(*NETS["mlp"])
    objective = Objective(program, ctx)
    true = torch.linalg.eigvalsh(true_hessian(objective)).flip(0).tolist()
    products, like = Products(objective), objective.parameters()
    loose: Any = {"rel": 1e-3, "abs": 1e-6}  # the tolerance that is asked for
    assert eigenvalues(products, like, count=3) == pytest.approx(true[:3], **loose)
    assert eigenvalues(products, like, end="bottom") == pytest.approx(true[-1:], **loose)
    both = eigenvalues(products, like, count=2, end="both")
    assert both == pytest.approx([true[0], true[-1]], **loose)
    small = Objective(program, ctx, ["3.bias"])  # of three elements: computed whole
    block = torch.linalg.eigvalsh(true_hessian(small)).flip(0).tolist()
    for end, wanted in (("top", block[:2]), ("bottom", block[-2:]), ("both", block[::2])):
        found = eigenvalues(Products(small), small.parameters(), count=2, end=end)  # type: ignore[arg-type]
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_eigenvalues_of_zero_are_zero() -> None:
    like = {"w": torch.randn(5, 5)}
    zero = lambda vector: {"w": torch.zeros(5, 5)}  # noqa: E731
    assert eigenvalues(zero, like, count=2) == [0.0, 0.0]


# -- the loss ------------------------------------------------------------------------------------


class TwoOutputs(nn.Module):
    """The second output is computed from the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        y = self.first(x)
        return y, self.second(y), 3


def test_gauss_newton_of_outputs_that_depend_on_each_other() -> None:
    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        y, z, _ = outputs
        return (y.sum(1) * z.sum(1)).square().mean() + y.square().mean()

    torch.manual_seed(0)
    batches = [torch.randn(6, 4).double()]
    program = capture(TwoOutputs().double(), (batches[0],))
    objective = Objective(program, PassContext(program, "test", batches, loss))
    like = objective.parameters()
    found = dense(Products(objective, "ggn").each, like)

    def outputs(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([v.numel() for v in like.values()])
        moved = {n: p.reshape(like[n].shape) for n, p in zip(like, pieces, strict=True)}
        y, z, _ = objective.outputs(moved, next(iter(objective)))
        return torch.cat([y, z], 1).flatten()

    flat = torch.cat([v.flatten() for v in like.values()])
    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    inner = torch.autograd.functional.hessian(
        lambda v: loss((v.reshape(6, 5)[:, :3], v.reshape(6, 5)[:, 3:], 3), batches[0]),
        outputs(flat).detach(),
    )
    torch.testing.assert_close(found, jacobian.T @ inner @ jacobian, **CLOSE)


def test_a_loss_that_is_linear_in_the_outputs_has_no_gauss_newton_matrix() -> None:
    program, ctx = problem(*NETS["mlp"], lambda outputs, batch: outputs.sum())
    objective = Objective(program, ctx)
    like = objective.parameters()
    assert not dense(Products(objective, "ggn").each, like).any()
    found = dense(Products(objective).each, like)  # the network bends all the same
    torch.testing.assert_close(found, true_hessian(objective), **CLOSE)


def test_a_model_that_is_linear_with_a_linear_loss_has_no_curvature() -> None:
    program, ctx = problem(lambda: nn.Linear(4, 3), (4,), lambda outputs, batch: outputs.sum())
    objective = Objective(program, ctx)
    assert not dense(Products(objective).each, objective.parameters()).any()


def test_an_op_without_a_forward_rule_falls_back_and_says_so() -> None:
    program, ctx = problem(lambda: nn.Sequential(nn.Linear(4, 6), Rooted(), nn.Linear(6, 3)), (4,))
    objective = Objective(program, ctx)
    products = Products(objective, "hessian", "forward")
    found = dense(products.each, objective.parameters())
    torch.testing.assert_close(
        found, dense(Products(objective).each, objective.parameters()), **CLOSE
    )
    assert products.mode == "reverse"
    assert ["forward" in d.message for d in ctx.diagnostics] == [True]


@torch.library.custom_op("curvature_test::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


cube.register_fake(torch.empty_like)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0])


cube.register_autograd(lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g, setup_context=_save)


class Rooted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.curvature_test.cube(x)


@pytest.mark.parametrize("steps", [8, 18])
def test_the_root_of_the_outputs_hessian(steps: int) -> None:
    program, ctx = problem(*NETS["mlp"])
    objective = Objective(program, ctx)
    batch = next(iter(objective))
    with objective.running(batch):
        outputs = objective.outputs(objective.leaves(), batch)
        hessian = OutputHessian(objective, outputs, batch)
    (shape,) = hessian.shapes
    units = torch.eye(shape.numel()).double().reshape(-1, *shape)
    matrix = torch.stack([hessian([u])[0].flatten() for u in units])
    values, vectors = torch.linalg.eigh(matrix)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    vector = torch.randn(shape).double()
    wanted = (root @ vector.flatten()).reshape(shape)
    # All 18 dimensions are exact but for the square root of rounding at the eigenvalues that are
    # zero; 8 of them are as near as a polynomial of that degree comes to the root.
    limit = 1e-6 if steps == 18 else 3e-2
    found = hessian.root([vector], steps=steps)[0]
    assert float((found - wanted).norm() / wanted.norm()) < limit


# -- traces --------------------------------------------------------------------------------------


def test_standard_errors() -> None:
    one = TraceEstimate.of([[1.0], [3.0]])
    assert (one.value, one.standard_error, one.samples) == (2.0, 1.0, 2)
    # Within batches there is no spread: the difference between them is not an error.
    assert TraceEstimate.of([[1.0, 1.0], [3.0, 3.0]]).standard_error == 0.0
    assert math.isnan(TraceEstimate.of([[1.0]]).standard_error)
    assert str(TraceEstimate(216.4, 41.0, 4)) == "216 ± 4e+01"


# -- changes of tensors --------------------------------------------------------------------------


@settings(max_examples=30)
@given(bits=st.integers(2, 8), rows=st.integers(1, 4), seed=st.integers(0, 99))
def test_rounding_is_within_half_a_step_and_rounds_once(bits: int, rows: int, seed: int) -> None:
    weight = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).double()
    weight[0] = 0
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    delta = quantise_delta(weight, bits)
    assert (delta.abs() <= step / 2 * (1 + 1e-12)).all()
    again = quantise_delta(weight + delta, bits)
    torch.testing.assert_close(again, torch.zeros_like(again), rtol=0, atol=1e-12)
    assert quantise_delta(weight, bits, axis=None).shape == weight.shape


def test_changes_of_tensors() -> None:
    weight = torch.randn(4, 3, 2)
    erased = weight + erase_delta(weight, 1, torch.tensor([0, 2]))
    assert not erased[:, [0, 2]].any()
    assert torch.equal(erased[:, 1], weight[:, 1])
    cut = weight + low_rank_delta(weight, 2)
    assert torch.linalg.matrix_rank(cut.flatten(1)) == 2
    values = torch.linalg.svdvals(weight.flatten(1))
    # The error is what Eckart and Young say, in float32.
    assert low_rank_delta(weight, 2).norm() == pytest.approx(float(values[2:].norm()), rel=1e-5)
    assert not low_rank_delta(weight, 4).any()
    assert torch.equal(low_rank_delta(weight, 0), -weight) or torch.allclose(
        low_rank_delta(weight, 0), -weight, atol=1e-6
    )
    assert torch.equal(tie_delta(weight, weight), torch.zeros_like(weight))
    with pytest.raises(ValueError, match="at least 2 bits"):
        quantise_delta(weight, 1)


# -- bad input -----------------------------------------------------------------------------------


def test_clear_errors() -> None:
    program, ctx = problem(*NETS["mlp"])
    with pytest.raises(OptionError, match="nonsense is not a floating parameter"):
        Objective(program, ctx, ["nonsense"])
    with pytest.raises(PreconditionError, match="needs loss"):
        Objective(program, PassContext(program, "mine", ctx.calibration))
    with pytest.raises(PreconditionError, match="needs calibration"):
        Objective(program, PassContext(program, "mine", None, cross_entropy))
    with pytest.raises(InputError, match="one number"):
        Products(Objective(program, PassContext(program, "mine", ctx.calibration, lambda o, b: o)))(
            {}
        )
