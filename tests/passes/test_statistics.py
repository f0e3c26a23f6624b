"""The collector: moments, gradients, samples and counts against brute force in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchlathe as tl
from torchlathe.ir import InputError, OptionError, PreconditionError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics import (
    Accumulator,
    Counts,
    LayerMoments,
    Moments,
    Reservoir,
    Watch,
    collect,
    collect_layers,
    layers,
    readers_of,
    stream_gradients,
)
from torchlathe.passes.statistics import moments as moments_module

# Float64 sums in another order.
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-13}


class Mixed(nn.Module):
    """Convolutions of several kinds, a tensor with positions, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.b = nn.Conv2d(6, 4, 3, groups=2, dilation=2)
        self.c = nn.Conv1d(4, 5, 3, padding="same")
        self.d, self.e = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = torch.tanh(self.c(x.flatten(2))).transpose(1, 2)
        return self.e(torch.relu(self.d(x)).mean(1))


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def mixed(batches: int = 3, size: int = 4) -> tuple[nn.Module, Program, list[Any]]:
    torch.manual_seed(0)
    model = Mixed().double().eval()
    data = [
        (torch.randn(size, 3, 12, 12, dtype=torch.float64), torch.randint(0, 3, (size,)))
        for _ in range(batches)
    ]
    return model, tl.capture(model, (data[0][0],), dynamic_shapes="auto"), data


def context(program: Program, data: Any, loss: Any = cross_entropy, **given: Any) -> PassContext:
    return PassContext(program, "test", calibration=data, loss=loss, **given)


def outputs_of(moments: LayerMoments) -> Tensor:
    """G."""
    assert moments.outputs is not None
    return moments.outputs.second


def by_weight(found: dict[Any, LayerMoments]) -> dict[str, LayerMoments]:
    return {moments.reader.weight.removesuffix(".weight"): moments for moments in found.values()}


def brute_force(model: nn.Module, data: list[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of each layer, (groups, ...), from one sample at a time and loops over positions."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    names = {layer: name for name, layer in model.named_children()}

    def keep(layer: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        result.retain_grad()
        kept[names[layer]] = (args[0].detach(), result)

    hooks = [layer.register_forward_hook(keep) for layer in names]
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    samples = 0
    for x, y in data:
        for i in range(len(x)):
            samples += 1
            cross_entropy(model(x[i : i + 1]), (None, y[i : i + 1])).backward()
            for name, (value, result) in kept.items():
                layer: Any = getattr(model, name)
                assert result.grad is not None
                if isinstance(layer, nn.Linear):
                    rows, grads = value.flatten(0, -2)[None], result.grad.flatten(0, -2)[None]
                else:
                    rows = windows(layer, value)
                    grads = result.grad[0].flatten(1).T.reshape(-1, layer.groups, rows_of(layer))
                    grads = grads.transpose(0, 1)
                a, g, n = sums.get(name, (torch.zeros(()), torch.zeros(()), 0))
                a = a + rows.mT @ rows
                sums[name] = (a, g + grads.mT @ grads, n + rows.shape[1])
    for hook in hooks:
        hook.remove()
    return {name: (a / n, g / samples) for name, (a, g, n) in sums.items()}


def rows_of(layer: Any) -> int:
    return int(layer.out_channels // layer.groups)


def windows(layer: Any, value: Tensor) -> Tensor:
    """(groups, positions, channels x kernel): slice by slice, one position at a time."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padding = (
        tuple((k - 1) * d // 2 for k, d in zip(kernel, dilation, strict=True))
        if layer.padding == "same"
        else layer.padding
    )
    value = F.pad(value[0], [p for each in reversed(padding) for p in (each, each)])
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extents = value.shape[1:]
    starts = [range(0, e - s + 1, t) for e, s, t in zip(extents, spans, stride, strict=True)]
    places = (
        [(i,) for i in starts[0]]
        if len(starts) == 1
        else [(i, j) for i in starts[0] for j in starts[1]]
    )
    rows = []
    for place in places:
        cut = value
        for axis, (start, span, step) in enumerate(zip(place, spans, dilation, strict=True)):
            cut = cut.narrow(axis + 1, start, span)
            cut = cut.index_select(axis + 1, torch.arange(0, span, step))
        rows.append(cut.reshape(layer.groups, -1))
    return torch.stack(rows, 1)


# -- layers ----------------------------------------------------------------------------------------


def test_layers_against_brute_force() -> None:
    model, program, data = mixed()
    found = by_weight(collect_layers(program, context(program, data), gradients=True))
    want = brute_force(model, data)
    assert found.keys() == want.keys()
    for name, (a, g) in want.items():
        moments = found[name]
        assert moments.outputs is not None
        torch.testing.assert_close(moments.inputs.second, a, **CLOSE)
        torch.testing.assert_close(moments.outputs.second, g, **CLOSE)
        assert moments.outputs.count == 12
        weight = program.entries[moments.reader.weight].tensor
        matrix = moments.weight_matrix(weight)
        groups, outs, features = matrix.shape
        assert moments.inputs.second.shape == (groups, features, features)
        assert moments.outputs.second.shape == (groups, outs, outs)
        assert torch.equal(moments.weight_from(matrix, weight.shape), weight)


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, data = mixed()
    whole = by_weight(collect_layers(program, context(program, data), gradients=True))
    for module in (layers, moments_module):
        monkeypatch.setattr(module, "_AT_ONCE", 100)
    parts = by_weight(collect_layers(program, context(program, data), gradients=True))
    for name, moments in whole.items():
        torch.testing.assert_close(parts[name].inputs.second, moments.inputs.second, **CLOSE)
        torch.testing.assert_close(outputs_of(parts[name]), outputs_of(moments), **CLOSE)
        assert parts[name].inputs.count == moments.inputs.count


def test_a_value_that_is_another_one_as_well() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            # Without training, the very tensor that it was given.
            return self.b(torch.ops.aten.dropout.default(self.a(x), 0.5, False))

    x = torch.randn(6, 4)
    program = tl.capture(Idle().eval(), (x,))
    first, same = [n for n in program.nodes if n.name in ("linear", "dropout")]
    watches = [Watch.axis(node, -1, gradient=True) for node in (first, same)]
    ctx = context(program, [x], lambda outputs, batch: outputs.square().mean())
    one, two = collect(program, ctx, watches).values()
    assert isinstance(one, Moments)
    assert isinstance(two, Moments)
    assert torch.equal(one.squares, two.squares)
    assert float(one.squares.sum()) > 0


@pytest.mark.parametrize("name", ["resnet", "bert", "gpt2"])
def test_rows_of_other_peoples_models_make_up_the_gradients_of_weights(name: str) -> None:
    """What is multiplied lies in one order in both: the gradient is the sum of their products."""
    model, batch = others_model(name)
    args, kwargs = ((batch[0],), {}) if name == "resnet" else ((), batch)
    program = tl.capture(model.double(), args, kwargs)
    ctx = context(program, [batch], cross_entropy if name == "resnet" else None)
    (gradients,) = stream_gradients(program, ctx)
    readers = list(readers_of(program).values())
    assert len(readers) > 5
    inputs = [Watch(r.operand, layers._input_watch(r).rows, into=Reservoir(9999)) for r in readers]
    outputs = [Watch(r.node, r.result_rows, gradient=True, into=Reservoir(9999)) for r in readers]
    found: Any = collect(program, ctx, [*inputs, *outputs], samples=lambda batch: 1)
    totals: dict[str, Tensor] = {}
    for reader, x, g in zip(readers, inputs, outputs, strict=True):
        total = found[g].rows.mT @ found[x].rows
        weight = reader.weight_from_layer(total, program.entries[reader.weight].tensor.shape)
        totals[reader.weight] = totals.get(reader.weight, torch.zeros(())) + weight
    for parameter, total in totals.items():
        if not parameter.endswith("wte.weight"):  # tied to a table that is looked up
            want = gradients.values[parameter]
            torch.testing.assert_close(total, want, rtol=1e-8, atol=1e-12)


def others_model(name: str) -> tuple[nn.Module, Any]:
    if name == "resnet":
        from torchvision.models import resnet18

        return resnet18(num_classes=3).eval(), (
            torch.randn(2, 3, 32, 32, dtype=torch.float64),
            torch.tensor([0, 2]),
        )
    ids = torch.randint(0, 30, (2, 7))
    if name == "gpt2":
        return language_model(), {"input_ids": ids, "labels": ids}
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = BertForSequenceClassification(config).eval()
    return model, {"input_ids": ids, "labels": torch.tensor([0, 1])}


def test_without_gradients_and_for_chosen_readers() -> None:
    _, program, data = mixed()
    readers = [r for r in readers_of(program).values() if r.weight in ("d.weight", "e.weight")]
    found = collect_layers(program, context(program, data, None), readers)
    assert [m.reader for m in found.values()] == readers
    assert all(m.outputs is None for m in found.values())
    both = collect_layers(program, context(program, data), readers, gradients=True)
    for node, moments in found.items():
        torch.testing.assert_close(moments.inputs.second, both[node].inputs.second, **CLOSE)


def test_kronecker_product_is_the_hessian_where_residuals_do_not_depend_on_inputs() -> None:
    # All pairs of three inputs and of residuals with the unit matrix as their second moment.
    inputs, outs = torch.randn(3, 4, dtype=torch.float64), 3
    signs = torch.cat([torch.eye(outs), -torch.eye(outs)]).double() * math.sqrt(outs)
    model = nn.Linear(4, outs).double().eval()
    x = inputs.repeat_interleave(2 * outs, 0)
    y = model(x).detach() - signs.repeat(3, 1)

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return 0.5 * (outputs - batch[1]).square().sum(1).mean()

    program = tl.capture(model, (x,))
    (moments,) = collect_layers(program, context(program, [(x, y)], loss), gradients=True).values()
    assert moments.outputs is not None
    got = torch.kron(moments.outputs.second[0], moments.inputs.second[0])

    def of_weight(flat: Tensor) -> Tensor:
        return loss(F.linear(x, flat.view(outs, 4), model.bias.detach()), (x, y))

    hessian = torch.autograd.functional.hessian(of_weight, model.weight.detach().flatten())
    torch.testing.assert_close(got, hessian, **CLOSE)


def test_batches_of_other_sizes_weigh_by_their_samples() -> None:
    _, program, data = mixed(2, 6)
    (x, y), (u, v) = data
    uneven = [(x[:2], y[:2]), (torch.cat([x[2:], u]), torch.cat([y[2:], v]))]
    one = by_weight(collect_layers(program, context(program, data), gradients=True))
    two = by_weight(collect_layers(program, context(program, uneven), gradients=True))
    for name in one:
        torch.testing.assert_close(outputs_of(one[name]), outputs_of(two[name]), **CLOSE)


def test_a_data_loader() -> None:
    from torch.utils.data import DataLoader, TensorDataset

    _, program, data = mixed()
    x, y = (torch.cat(each) for each in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    said: list[str] = []
    ctx = context(program, loader, progress=said.append)
    one = by_weight(collect_layers(program, ctx, gradients=True))
    two = by_weight(collect_layers(program, context(program, data), gradients=True))
    assert said[-1] == "statistics: batch 3 of 3"
    for name in one:
        torch.testing.assert_close(outputs_of(one[name]), outputs_of(two[name]), **CLOSE)


def test_queries_keys_and_values_share_their_moments() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0).eval()

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            attended = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return self.layer(attended)

    x = torch.randn(2, 5, 8)
    program = tl.capture(Three().eval(), (x,))
    found = by_weight(collect_layers(program, context(program, [x], None)))
    assert found["q"].inputs is found["k"].inputs is found["v"].inputs


def test_what_the_loss_does_not_depend_on_has_no_curvature() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    x = torch.randn(5, 4)
    program = tl.capture(Two().eval(), (x,))
    ctx = context(program, [x, x], lambda outputs, batch: outputs[0].square().mean())
    found = by_weight(collect_layers(program, ctx, gradients=True))
    assert found["a"].outputs is not None
    assert found["b"].outputs is not None
    assert float(found["a"].outputs.second.sum()) != 0
    assert torch.equal(found["b"].outputs.second, torch.zeros(1, 2, 2, dtype=torch.float64))
    assert found["b"].outputs.count == 10


def test_nothing_of_the_callers_changes() -> None:
    model, program, data = mixed()
    before = {n: p.clone() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    collect_layers(program, context(program, data), gradients=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(x.requires_grad for x, _ in data)


def test_in_inference_mode_and_with_inputs_of_it() -> None:
    with torch.inference_mode():
        _, program, data = mixed()
        found = by_weight(collect_layers(program, context(program, data), gradients=True))
    want = brute_force(*mixed()[::2])
    for name, (_, g) in want.items():
        torch.testing.assert_close(outputs_of(found[name]), g, **CLOSE)


def test_dtypes() -> None:
    _, program, data = mixed()
    wide = by_weight(collect_layers(program, context(program, data), gradients=True))
    narrow = by_weight(
        collect_layers(program, context(program, data), gradients=True, dtype=torch.float32)
    )
    for name, moments in wide.items():
        for mine, theirs in (
            (moments.inputs, narrow[name].inputs),
            (moments.outputs, narrow[name].outputs),
        ):
            assert mine is not None
            assert theirs is not None
            assert theirs.second.dtype is torch.float32
            scale = float(mine.second.abs().max())
            # Sums of at most 432 rows, in float32.
            assert float((mine.second - theirs.second).abs().max()) < 1e-5 * scale
    single = tl.capture(Mixed().eval(), (torch.randn(2, 3, 12, 12),))
    batch = (torch.randn(2, 3, 12, 12), torch.tensor([0, 1]))
    ctx = context(single, [batch])
    run = collect_layers(single, ctx, gradients=True, run_dtype=torch.float64)
    plain = collect_layers(single, ctx, gradients=True)
    for node, moments in run.items():
        assert moments.outputs is not None
        other = plain[node].outputs
        assert other is not None
        difference = (moments.outputs.second - other.second).abs().max()
        # The same but for rounding in float32, which is there.
        assert 0 < float(difference) < 1e-4 * float(moments.outputs.second.abs().max())


# -- watches ---------------------------------------------------------------------------------------


def test_gradients_of_values_and_of_inputs() -> None:
    model, program, data = mixed()
    node = program.input_nodes[0]
    relu = next(n for n in program.nodes if n.name == "relu")
    watches = [
        Watch.axis(node, 1, gradient=True),
        Watch.axis(node, 1),
        Watch.axis(relu, 1, gradient=True, matrix=True),
    ]
    ctx = context(program, data)
    of_input, values, inside = collect(program, ctx, watches).values()
    assert isinstance(of_input, Moments)
    assert isinstance(inside, Moments)
    assert isinstance(values, Moments)
    total = torch.zeros(3, dtype=torch.float64)
    for x, y in data:
        leaf = x.clone().requires_grad_(True)
        cross_entropy(model(leaf), (leaf, y)).backward()
        assert leaf.grad is not None
        total += (leaf.grad * len(x)).square().sum((0, 2, 3))
    torch.testing.assert_close(of_input.squares[0], total, **CLOSE)
    assert inside.second.shape == (1, 6, 6)
    assert values.count == 12 * 144


def test_samples_of_the_loss_can_be_counted_by_the_caller() -> None:
    _, program, data = mixed()
    ctx = context(program, data)
    one = by_weight(collect_layers(program, ctx, gradients=True))
    two = by_weight(collect_layers(program, ctx, gradients=True, samples=lambda b: 3 * len(b[0])))
    for name, moments in one.items():
        torch.testing.assert_close(outputs_of(two[name]), 3 * outputs_of(moments), **CLOSE)


def test_routing_statistics_of_a_node() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, chosen = self.gate(x).softmax(-1).topk(2)
            return values, chosen

    class Largest(Accumulator):
        def __init__(self) -> None:
            self.found: list[float] = []

        def add(self, rows: Tensor, count: int | None = None) -> None:
            self.found.append(float(rows.max()))

    model = Router().eval()
    data = [torch.randn(5, 7, 6) for _ in range(3)]
    program = tl.capture(model, (data[0],))
    chosen = list(program.nodes)[-1].all_input_nodes[1]
    logits = next(n for n in program.nodes if "linear" in n.name)
    counts, largest = Counts(4), Largest()
    watches = [
        Watch.whole(chosen, counts),
        Watch.axis(logits, -1, matrix=True),
        Watch.whole(logits, largest),
    ]
    found = list(collect(program, context(program, data, None), watches).values())
    every = torch.cat([model(x)[1].flatten() for x in data])
    assert found[0] is counts
    assert torch.equal(counts.values, torch.bincount(every, minlength=4))
    assert counts.count == 3 * 5 * 7 * 2
    assert float(counts.shares.sum()) == pytest.approx(1)
    assert isinstance(found[1], Moments)
    assert found[1].second.shape == (1, 4, 4)
    assert largest.found == [float(model.gate(x).detach().max()) for x in data]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    groups=st.integers(1, 3),
    extent=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_moments_do_not_depend_on_the_batches(
    sizes: list[int], groups: int, extent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, sum(sizes), extent)
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    whole, parts = Moments(matrix=True), Moments(matrix=True)
    whole.add(rows)
    for part in rows.split(sizes, 1):
        parts.add(part)
    assert whole.count == parts.count == sum(sizes)
    for name in ("mean", "variance", "norm", "second", "covariance"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), **CLOSE)
    torch.testing.assert_close(parts.second, parts.second.mT, **CLOSE)
    # Semidefinite, but for rounding.
    least = float(torch.linalg.eigvalsh(parts.second).min())
    assert least >= -1e-12 * (1 + float(parts.second.diagonal(dim1=1, dim2=2).sum()))


# -- samples of rows -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    size=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_reservoir(sizes: list[int], size: int, seed: int) -> None:
    rows = torch.arange(sum(sizes)).double()[None, :, None].repeat(2, 1, 3)
    one, two = Reservoir(size, seed), Reservoir(size, seed)
    for part in rows.split(sizes, 1):
        one.add(part)
        two.add(2 * part[:1])
    kept = min(size, sum(sizes))
    assert one.count == sum(sizes)
    assert one.rows.shape == (2, kept, 3)
    assert torch.equal(one.rows[0, :, 0], one.positions.double())  # rows stay with their places
    assert bool((one.positions.diff() > 0).all())
    # Paired with another value of equally many rows.
    assert torch.equal(two.rows[0, :, 0], 2 * one.rows[0, :, 0])


def test_reservoir_is_uniform() -> None:
    found = torch.zeros(40)
    for seed in range(600):
        reservoir = Reservoir(10, seed)
        for part in torch.arange(40)[None, :, None].split([5, 20, 1, 14], 1):
            reservoir.add(part)
        found[reservoir.positions] += 1
    # Each is kept in 150 of 600 runs, with a standard deviation of 10.6; five of them.
    assert float((found - 150).abs().max()) < 53


def test_reservoir_of_a_feature_map() -> None:
    model, program, data = mixed()
    relu = next(n for n in program.nodes if n.name == "relu")
    reservoir = Reservoir(50, seed=3)
    collect(program, context(program, data, None), [Watch.axis(relu, 1, into=reservoir)])
    maps = torch.cat([torch.relu(model.a(x)) for x, _ in data])  # type: ignore[operator]
    every = maps.movedim(1, -1).reshape(-1, 6).detach()
    torch.testing.assert_close(reservoir.rows[0], every[reservoir.positions], **CLOSE)
    assert reservoir.count == len(every)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        pytest.param({"dtype": torch.float16}, OptionError, "float32 or float64", id="dtype"),
        pytest.param({"limit_bytes": -1}, OptionError, "must not be negative", id="limit"),
        pytest.param({"save_every": 0}, OptionError, "at least 1", id="save_every"),
        pytest.param({"spill": __file__}, InputError, "cannot be used as a folder", id="spill"),
        pytest.param({"resume": __file__}, InputError, "cannot be used as a folder", id="resume"),
    ],
)
def test_bad_options(options: Any, kind: Any, message: str) -> None:
    _, program, _ = mixed()

    class Never:
        def __iter__(self) -> Any:
            raise AssertionError("the data was read")

    with pytest.raises(kind, match=message):
        collect_layers(program, context(program, Never()), **options)


def test_an_empty_reservoir_and_a_size_of_none() -> None:
    with pytest.raises(OptionError, match="at least 1"):
        Reservoir(0)
    with pytest.raises(ValueError, match="no rows"):
        _ = Reservoir(2).rows


def test_gradients_need_a_loss() -> None:
    _, program, data = mixed()
    with pytest.raises(PreconditionError, match="needs loss"):
        collect_layers(program, context(program, data, None), gradients=True)
    with pytest.raises(PreconditionError, match="needs calibration"):
        collect_layers(program, context(program, None), gradients=True)


# -- models of transformers ------------------------------------------------------------------------


def language_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False
    )
    return GPT2LMHeadModel(config).eval()


def test_the_own_loss_of_a_language_model() -> None:
    model = language_model()
    data = [torch.randint(0, 30, (3, 8)) for _ in range(2)]
    batches = [{"input_ids": ids, "labels": ids} for ids in data]
    program = tl.capture(model, (), batches[0])
    tokens = 3 * 7  # the first token of each is not predicted
    found = collect_layers(
        program, context(program, batches, None), gradients=True, samples=lambda _: tokens
    )
    (head,) = (
        m for m in found.values() if m.reader.result_rows(m.reader.node.meta["val"]).shape[2] == 30
    )
    assert head.outputs is not None
    want = torch.zeros(30, 30, dtype=torch.float64)
    for ids in data:
        logits = model(input_ids=ids).logits.detach()[:, :-1].double()
        each = logits.softmax(-1) - F.one_hot(ids[:, 1:], 30)
        want += torch.einsum("bti,btj->ij", each, each)
    # Float32 logits.
    torch.testing.assert_close(head.outputs.second[0], want / (2 * tokens), rtol=1e-4, atol=1e-6)


def test_a_model_that_was_captured_without_labels_says_what_to_do() -> None:
    from transformers import BertConfig, BertForQuestionAnswering, BertModel

    ids = torch.randint(0, 30, (2, 6))
    program = tl.capture(language_model(), (), {"input_ids": ids})
    ctx = context(program, [{"input_ids": ids}], None)
    with pytest.raises(
        PreconditionError, match="GPT2LMHeadModel computes its own loss from labels"
    ):
        collect_layers(program, ctx, gradients=True)
    config = BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    program = tl.capture(BertForQuestionAnswering(config).eval(), (), {"input_ids": ids})
    ctx = context(program, [{"input_ids": ids}], None)
    with pytest.raises(PreconditionError, match="start_positions and end_positions"):
        collect_layers(program, ctx, gradients=True)
    program = tl.capture(BertModel(config).eval(), (), {"input_ids": ids})
    ctx = context(program, [{"input_ids": ids}], None)
    with pytest.raises(PreconditionError, match="BertModel has no loss of its own"):
        collect_layers(program, ctx, gradients=True)


def test_batches_without_the_labels_that_were_captured() -> None:
    ids = torch.randint(0, 30, (2, 6))
    program = tl.capture(language_model(), (), {"input_ids": ids, "labels": ids})
    ctx = context(program, [{"input_ids": ids}], None)
    with pytest.raises(InputError, match="batch 0 does not fit the program"):
        collect_layers(program, ctx, gradients=True)
