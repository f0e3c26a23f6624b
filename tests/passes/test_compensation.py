"""Refitting after an erase: exact where it can be, else better; and the statistics under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import InputError, OptionError, Program
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import PassContext
from torchlathe.passes.rewrite.compensating.compensation import Compensation, Refit
from torchlathe.passes.rewrite.compensating.refitting import Problem, solve
from torchlathe.passes.rewrite.erasing.shrink import erase_units
from torchlathe.passes.statistics import (
    LockstepRun,
    Watch,
    collect_gradients,
    collect_moments,
    patches,
    readers_of,
)


class Chain(nn.Module):
    """Two layers with duplicated hidden units: 4 is 1, and 5 is twice 2."""

    def __init__(self, act: Any = nn.Identity) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(5, 6), act(), nn.Linear(6, 4)
        with torch.no_grad():
            for tensor in (self.a.weight, self.a.bias):
                tensor[4], tensor[5] = tensor[1], 2 * tensor[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class Convs(nn.Module):
    def __init__(self, groups: int = 1, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 8, 3, groups=groups, bias=bias, **options)
        with torch.no_grad():
            for tensor in self.a.parameters():
                tensor[2], tensor[5] = tensor[1], 2 * tensor[3]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Attention(nn.Module):
    """Values of head 2 are twice those of head 0, under the same scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(6, 36), nn.Linear(12, 6)
        with torch.no_grad():
            for tensor in (self.qkv.weight, self.qkv.bias):
                rows = tensor.view(3, 3, 4, -1)
                rows[:, 2] = rows[:, 0]
                rows[2, 2] *= 2

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, n, 12))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(self.norm(x))


def made(model: nn.Module, *shape: int) -> tuple[Program, list[Tensor]]:
    batches = [torch.randn(16, *shape, dtype=torch.float64) for _ in range(4)]
    return tl.capture(model.double().eval(), (batches[0],), dynamic_shapes="auto"), batches


def erased(
    program: Program, batches: Any, units: dict[str, list[int]], **options: Any
) -> tuple[Program, Program, list[Refit]]:
    """Without and with compensation, and what it did."""
    families = program.analysis(ZeroInvariantGroups)
    chosen = {families.by_name(name): torch.tensor(u) for name, u in units.items()}
    ctx = PassContext(program, "test", calibration=batches)
    compensation = Compensation(program, ctx, chosen, **options)
    erase_units(program, chosen)
    plain = program.copy()
    refits = compensation.apply(program)
    return plain, program, refits


def error(program: Program, want: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        return float((program.run(x) - want).norm() / want.norm())


EXACT: Any = {"ridge": 1e-12}


# -- exact where erased units are combinations of kept ones --------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "units"),
    [
        pytest.param(lambda: Chain(), (5,), {"a.weight:0": [4, 5]}, id="linear"),
        pytest.param(lambda: Chain(nn.ReLU), (5,), {"a.weight:0": [1, 5]}, id="relu"),
        # Six units of a linear layer on three inputs: any one is a combination of the others.
        pytest.param(
            lambda: nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4)),
            (3,),
            {"0.weight:0": [0, 4]},
            id="combination",
        ),
        pytest.param(lambda: Convs(), (2, 7, 7), {"a.weight:0": [2, 5]}, id="conv"),
        pytest.param(lambda: Convs(bias=False), (2, 7, 7), {"a.weight:0": [1, 3]}, id="no-bias"),
        pytest.param(
            lambda: Convs(padding=1, stride=2), (2, 7, 7), {"a.weight:0": [2]}, id="padded-strided"
        ),
        pytest.param(lambda: Convs(dilation=2), (2, 9, 9), {"a.weight:0": [2]}, id="dilated"),
        pytest.param(lambda: Convs(padding="same"), (2, 7, 7), {"a.weight:0": [2]}, id="same"),
        pytest.param(lambda: Attention(), (5, 6), {"qkv.weight:0/1": [2]}, id="heads"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "plain"])
def test_exact(model: Any, shape: Any, units: Any, streamed: bool) -> None:
    program, batches = made(model(), *shape)
    x = torch.randn(8, *shape, dtype=torch.float64)
    want = program.run(x).detach()
    plain, after, refits = erased(program, batches, units, streamed=streamed, **EXACT)
    assert error(plain, want, x) > 1e-2
    # A ridge of 1e-12 and a condition number of up to 1e4 or so.
    assert error(after, want, x) < 1e-6
    assert [r.ridge for r in refits] == [1e-12]
    assert refits[0].after < 1e-10 < refits[0].before


def test_exact_with_the_damping_that_it_chooses() -> None:
    program, batches = made(Chain(nn.ReLU), 5)
    want = program.run(batches[0]).detach()
    _, after, (refit,) = erased(program, batches, {"a.weight:0": [4, 5]})
    assert refit.ridge == 1e-8
    assert error(after, want, batches[0]) < 1e-6


def test_grouped_convolution() -> None:
    # Channel 2 is channel 1 of the first group; 5 is twice 3 in the second.
    program, batches = made(Convs(groups=2), 2, 7, 7)
    want = program.run(batches[0]).detach()
    # One unit goes from both groups at the same place: indices 2 and 5.
    _, after, _ = erased(program, batches, {"a.weight:0/1": [2]}, **EXACT)
    assert error(after, want, batches[0]) < 1e-6


def test_constant_units_move_into_the_bias() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            with torch.no_grad():
                self.a.weight[2] = 0
                self.a.bias[2] = 0.7

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(x)))

    program, batches = made(Constant(), 4)
    want = program.run(batches[0]).detach()
    plain, after, _ = erased(program, batches, {"a.weight:0": [2]}, **EXACT)
    assert error(plain, want, batches[0]) > 1e-3
    assert error(after, want, batches[0]) < 1e-9


def test_transposed_convolution_mixes_channels() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 3, 2, stride=2)
            with torch.no_grad():
                for tensor in self.a.parameters():
                    tensor[4] = tensor[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    program, batches = made(Up(), 2, 4, 4)
    want = program.run(batches[0]).detach()
    _, after, (refit,) = erased(program, batches, {"a.weight:0": [4]}, **EXACT)
    assert refit.weight == "b.weight"
    assert error(after, want, batches[0]) < 1e-6


def test_large_convolutions_mix_channels() -> None:
    program, batches = made(Convs(), 2, 7, 7)
    want = program.run(batches[0]).detach()
    _, after, _ = erased(program, batches, {"a.weight:0": [2, 5]}, most_read=4, **EXACT)
    assert error(after, want, batches[0]) < 1e-6


# -- better where it cannot be exact -------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True], ids=["lost", "everything"])
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "plain"])
def test_random_erase_gets_better(streamed: bool, everything: bool) -> None:
    program, batches = made(Residual(), 6)
    x = torch.randn(64, 6, dtype=torch.float64)
    want = program.run(x).detach()
    units = {"enter.weight:0": [0, 3, 7], "up.weight:0": list(range(0, 20, 3))}
    plain, after, refits = erased(program, batches, units, streamed=streamed, everything=everything)
    assert {r.weight for r in refits} >= {"up.weight", "down.weight", "head.weight"}
    assert all(r.after <= r.before for r in refits)
    assert any(r.after < r.before for r in refits)
    assert error(after, want, x) < error(plain, want, x)


def test_streaming_sees_what_earlier_layers_did() -> None:
    """The last layer is fitted to inputs as they are: no other weight has less error there."""
    program, batches = made(Residual(), 6)
    original = program.copy()
    units = {"enter.weight:0": [0, 3, 7], "up.weight:0": [1, 2, 3]}
    _, after, refits = erased(program, batches, units, ridge=0.0)
    last = next(r for r in refits if r.weight == "head.weight")
    data = torch.cat(batches)
    want = original.run(data).detach()
    seen: list[Tensor] = []
    from torchlathe.ir.interpreting import run_flat

    node = next(n for n in after.nodes if n.name == last.node)
    with torch.no_grad():
        run_flat(after, [data], observe=lambda n, v: seen.append(v) if n is node.args[0] else None)
    x = torch.cat([seen[0], torch.ones(len(data), 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(x, want, driver="gelsd").solution
    got = torch.cat([after.tensor("head.weight").T, after.tensor("head.bias")[None]]).detach()
    # The same minimum, to rounding of normal equations.
    assert float((x @ got - want).norm()) == pytest.approx(
        float((x @ best - want).norm()), rel=1e-6
    )
    assert last.after == pytest.approx(
        float((x @ best - want).square().sum() / want.square().sum()), rel=1e-6
    )


def test_what_gains_nothing_stays() -> None:
    """Pure noise on the other half of the samples: no fit helps there."""
    halves = Problem(), Problem()
    for half in halves:
        half.add(torch.randn(1, 30, 20).double(), torch.randn(1, 30, 4).double())
    weight, bias = torch.zeros(1, 4, 20).double(), torch.zeros(1, 4).double()
    assert solve(halves, weight, bias, affine=False) is None


def test_solution_against_numpy() -> None:
    import numpy as np

    x, y = torch.randn(1, 50, 6).double(), torch.randn(1, 50, 3).double()
    halves = Problem(), Problem()
    halves[0].add(x[:, :25], y[:, :25])
    halves[1].add(x[:, 25:], y[:, 25:])
    start, bias = torch.zeros(1, 3, 6).double(), torch.zeros(1, 3).double()
    found = solve(halves, start, bias, affine=True, ridge=0.0)
    assert found is not None
    design = np.concatenate([x[0].numpy(), np.ones((50, 1))], 1)
    best = np.linalg.lstsq(design, y[0].numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weight[0].T.numpy(), best[:-1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.bias[0].numpy(), best[-1], rtol=1e-9, atol=1e-12)
    residual = y[0].numpy() - design @ best
    assert found.after == pytest.approx((residual**2).sum() / 50, rel=1e-9)


# -- bookkeeping ---------------------------------------------------------------------------------


def test_tied_weights_and_shared_biases_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.b(torch.relu(self.b(x))).sum(-1)

    program, batches = made(Tied(), 4)
    families = program.analysis(ZeroInvariantGroups)
    before = program.tensor("b.weight").detach().clone()
    units = {f: torch.tensor([0]) for f in families.prunable}
    ctx = PassContext(program, "test", calibration=batches)
    compensation = Compensation(program, ctx, units)
    erase_units(program, units)
    small = program.tensor("b.weight").detach().clone()
    assert compensation.apply(program) == []
    assert torch.equal(program.tensor("b.weight"), small)
    assert before.shape != small.shape


def test_after_an_earlier_erase_and_inside_an_edit() -> None:
    program, batches = made(Chain(nn.ReLU), 5)
    want = program.run(batches[0]).detach()
    erased(program, batches, {"a.weight:0": [4]}, **EXACT)
    families = program.analysis(ZeroInvariantGroups)
    units = {families.by_name("a.weight:0"): torch.tensor([4])}  # what was unit 5
    ctx = PassContext(program, "test", calibration=batches)
    compensation = Compensation(program, ctx, units, **EXACT)
    erase_units(program, units)
    with program.edit("test") as edit:
        compensation.apply(edit)
    assert program.kept["a.weight"][0].tolist() == [0, 1, 2, 3]
    assert error(program, want, batches[0]) < 1e-6
    assert program.rewritten == {"b.weight", "b.bias"}


def test_models_and_batches_do_not_change() -> None:
    model = Residual()
    program, batches = made(model, 6)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    data = [x.clone() for x in batches]
    erased(program, batches, {"up.weight:0": [0, 1]})
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip(batches, data, strict=True))


def test_without_data_it_warns_and_past_the_limit_it_uses_fewer() -> None:
    program, batches = made(Residual(), 6)
    families = program.analysis(ZeroInvariantGroups)
    units = {families.by_name("up.weight:0"): torch.tensor([0])}
    ctx = PassContext(program, "test")
    compensation = Compensation(program.copy(), ctx, units)
    assert "example inputs" in ctx.diagnostics[0].message
    ctx = PassContext(program, "test", calibration=batches)
    compensation = Compensation(program, ctx, units, limit_bytes=1)
    erase_units(program, units)
    assert compensation.apply(program)
    assert "1 of 4 batches" in ctx.diagnostics[0].message


def test_bad_options() -> None:
    program, batches = made(Residual(), 6)
    ctx = PassContext(program, "test", calibration=batches)
    with pytest.raises(OptionError, match="ridge is -1"):
        Compensation(program, ctx, {}, ridge=-1)
    families = program.analysis(ZeroInvariantGroups)
    units = {families.by_name("up.weight:0"): torch.tensor([0])}
    ctx = PassContext(program, "test", calibration=[torch.randn(3, 9)])
    compensation = Compensation(program, ctx, units)
    erase_units(program, units)
    with pytest.raises(InputError, match="batch 0 does not fit"):
        compensation.apply(program)


def test_other_peoples_models() -> None:
    from torchvision.models import resnet18
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=24,
            max_position_embeddings=16,
        ),
        add_pooling_layer=False,
    )
    gpt2 = GPT2Model(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    )
    cases: list[tuple[nn.Module, Any, set[str]]] = [
        (resnet18(num_classes=4), lambda: torch.randn(2, 3, 32, 32), {"layer1.0.conv2.weight"}),
        (bert, lambda: {"input_ids": torch.randint(0, 50, (4, 9))}, {"output.dense.weight"}),
        (gpt2, lambda: {"input_ids": torch.randint(0, 50, (4, 9))}, {"c_proj.weight"}),
    ]
    for model, sample, wanted in cases:
        batches = [sample() for _ in range(8)]
        args, kwargs = ((), batches[0]) if isinstance(batches[0], dict) else ((batches[0],), {})
        program = tl.capture(model.eval(), args, kwargs)
        original = program.copy()
        families = program.analysis(ZeroInvariantGroups)
        units = {
            f.name: list(range(0, f.extent, 4)) for f in families.prunable if 4 <= f.extent <= 64
        }
        plain, after, refits = erased(program, batches, units)
        names = {r.weight for r in refits}
        assert all(any(n.endswith(w) for n in names) for w in wanted)
        assert all(r.after <= r.before for r in refits)

        def outputs(of: Program, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            with torch.no_grad():
                return torch.utils._pytree.tree_leaves(of.run(*args, **kwargs))[0]

        want = outputs(original)
        assert (outputs(after) - want).norm() < (outputs(plain) - want).norm()


# -- the statistics under it ---------------------------------------------------------------------


def test_moments_against_hooks() -> None:
    model = Residual().double().eval()
    program, batches = made(model, 6)
    readers = readers_of(program)
    assert {r.weight for r in readers.values()} == {
        "enter.weight",
        "up.weight",
        "down.weight",
        "head.weight",
    }
    (reader,) = (r for r in readers.values() if r.weight == "down.weight")
    rows: list[Tensor] = []
    hook = model.down.register_forward_hook(lambda m, args, out: rows.append(args[0].detach()))
    for x in batches:
        model(x)
    hook.remove()
    data = torch.cat(rows)
    watches = [
        Watch(reader.operand, reader.data_rows, matrix=True),
        Watch.axis(reader.operand, 1),
        Watch.axis(program.input_nodes[0], 1, matrix=True),
    ]
    for limit in (2**31, 1):  # in one sweep, and in one for each
        ctx = PassContext(program, "test", calibration=batches)
        found = collect_moments(program, ctx, watches, limit_bytes=limit)
        first, second, third = (found[w] for w in watches)
        close: Any = {"rtol": 1e-10, "atol": 1e-12}
        torch.testing.assert_close(first.second[0], data.T @ data / len(data), **close)
        torch.testing.assert_close(first.covariance[0], data.T.cov(correction=0), **close)
        torch.testing.assert_close(second.mean[0], data.mean(0), **close)
        torch.testing.assert_close(second.variance[0], data.var(0), **close)
        torch.testing.assert_close(second.norm[0], data.norm(dim=0), **close)
        torch.testing.assert_close(
            third.second[0], sum(x.T @ x for x in batches) / len(data), **close
        )
        assert (first.count, second.count) == (64, 64)
        with pytest.raises(ValueError, match="not collected"):
            _ = second.second


def test_variance_of_a_large_mean() -> None:
    from torchlathe.passes.statistics import Moments

    rows = 1000 + torch.randn(1, 500, 3)  # float32 has seven digits, and the squares take them
    moments = Moments()
    for part in rows.split(100, dim=1):
        moments.add(part)
    torch.testing.assert_close(moments.variance[0], rows[0].double().var(0), rtol=1e-6, atol=0)


def test_gradients_against_autograd() -> None:
    model = Residual().double().eval()
    program, batches = made(model, 6)

    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        return (outputs - batch[:, :5]).square().mean()

    ctx = PassContext(program, "test", calibration=batches, loss=loss)
    found = collect_gradients(program, ctx)
    grads: list[list[Tensor]] = []
    for x in batches:
        model.zero_grad()
        loss(model(x), x).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for (name, _), *each in zip(model.named_parameters(), *grads, strict=True):
        moments = found[name]
        assert moments.count == 4
        torch.testing.assert_close(moments.total, sum(each), rtol=1e-10, atol=1e-14)
        squares = sum(g.square() for g in each)
        torch.testing.assert_close(moments.squares, squares, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        pytest.param(nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 7, 7), id="2d"),
        pytest.param(nn.Conv2d(4, 6, (1, 3), padding="same", groups=2), (2, 4, 5, 7), id="grouped"),
        pytest.param(nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), id="1d"),
        pytest.param(nn.Conv2d(4, 4, 3, groups=4, padding=(0, 2)), (2, 4, 6, 6), id="depthwise"),
    ],
)
def test_patches_times_weight_is_the_convolution(layer: Any, shape: Any) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x = torch.randn(*shape, dtype=torch.float64)
    program = tl.capture(One().double().eval(), (x,))
    node = next(n for n in program.nodes if "conv" in n.name and n.op == "call_function")
    readers = readers_of(program)
    if node not in readers:  # depthwise: nothing is summed over but the kernel
        assert layer.groups == 4
        return
    reader = readers[node]
    rows = patches(reader, x)
    assert rows is not None
    weight, bias = (p.detach() for p in layer.parameters())
    groups = layer.groups
    want = reader.result_rows(layer(x).detach())
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    got = rows @ matrix.transpose(1, 2) + bias.reshape(groups, 1, -1)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    again = reader.weight_from(reader.weight_matrix(weight), weight.shape)
    assert torch.equal(again, weight)


def test_lockstep_gives_the_values_and_frees_them() -> None:
    program, batches = made(Residual(), 6)
    run = LockstepRun(program, [[x] for x in batches])
    last = [n for n in program.nodes if n.op == "call_function"][-1]
    middle = next(n for n in program.nodes if n.name == "gelu")
    values = run.run_through(middle)
    with torch.no_grad():
        assert len(values) == 4
        outputs = run.run_through(last)
        for x, y in zip(batches, outputs, strict=True):
            torch.testing.assert_close(y, program.run(x))
    assert middle not in run.values
    assert run.peak_bytes >= sum(x.nbytes for x in batches)
