import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from torchlathe.ir import InputError, OptionError
from torchlathe.passes import SparsifyNM
from torchlathe.passes.rewrite.sparsifying.solving import solve
from torchlathe.passes.rewrite.sweeping.masking import Masking
from torchlathe.passes.rewrite.sweeping.patterns import parse_pattern
from torchlathe.passes.rewrite.sweeping.sweep import relative_error, sweep
from torchlathe.passes.statistics import readers_of
from torchlathe.passes.statistics.arriving import arrivals


def pattern(text, sparsity=0.5, block=4):
    return parse_pattern(text, sparsity, block, "test")


def correlated(rows, columns, seed=0):
    """A matrix, and the second moment of data whose columns depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(4 * columns, columns, dtype=torch.float64, generator=generator)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    data = data @ (mix + 2 * torch.eye(columns, dtype=torch.float64))
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return weight, data.T @ data / len(data)


# -- patterns ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    keep=st.integers(1, 7),
    more=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_n_of_m_masks_keep_exactly_the_highest_n(rows, groups, keep, more, seed):
    span = keep + more
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, groups * span, generator=generator)
    found = pattern(f"{keep}:{span}")
    mask = found.mask(scores)
    parts, kept = scores.unflatten(1, (-1, span)), mask.unflatten(1, (-1, span))
    assert bool((kept.sum(2) == keep).all())
    least = parts.masked_fill(~kept, math.inf).amin(2)
    assert bool((parts.masked_fill(kept, -1.0).amax(2) <= least).all())
    assert found.holds(scores * mask)
    assert not found.holds(torch.ones_like(scores))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    sparsity=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_blocks_and_unstructured_masks_lose_the_share_that_was_asked_for(
    rows, columns, sparsity, seed
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4 * rows, 4 * columns, generator=generator)
    blocks = pattern("block", sparsity).mask(scores)
    each = blocks.reshape(rows, 4, columns, 4).permute(0, 2, 1, 3).flatten(2)
    assert bool((each.all(2) | ~each.any(2)).all())
    assert int((~each.any(2)).sum()) == math.floor(sparsity * rows * columns)
    anywhere = pattern("unstructured", sparsity)
    assert int((~anywhere.mask(scores)).sum()) == math.floor(sparsity * scores.numel())
    by_row = (~anywhere.mask(scores, by_row=True)).sum(1)
    assert bool((by_row == math.floor(sparsity * scores.shape[1])).all())


@pytest.mark.parametrize("text", ["2;4", "4:4", "0:4", "5:4", "two of four", ""])
def test_patterns_that_are_none(text):
    with pytest.raises(OptionError, match="pattern"):
        SparsifyNM(pattern=text)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "block", "sparsity": 1.0},
        {"pattern": "unstructured", "sparsity": 0.0},
        {"pattern": "block", "block": 1},
        {"damping": 0.0},
        {"method": "obs"},
    ],
    ids=["all", "none", "side", "damping", "method"],
)
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        SparsifyNM(**options)


# -- one matrix --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2:4", "4:8", "block", "unstructured"])
def test_methods_are_in_order_and_their_errors_are_true(text):
    weight, moment = correlated(24, 32)
    found = {
        method: solve(weight, moment, pattern(text), method)
        for method in ("magnitude", "wanda", "sparsegpt")
    }
    for one in found.values():
        assert bool((one.weight[~one.mask] == 0).all())
        # The formula tr(D H D') / tr(W H W'), both in float64.
        lost = weight - one.weight
        direct = ((lost @ moment) * lost).sum() / ((weight @ moment) * weight).sum()
        assert one.error == pytest.approx(float(direct), rel=1e-9)
        assert one.magnitude == found["magnitude"].error
    assert found["sparsegpt"].error <= found["wanda"].error
    assert found["sparsegpt"].error < 0.9 * found["magnitude"].error


def test_independent_inputs_leave_nothing_to_make_up_for():
    weight, _ = correlated(16, 16)
    swept = solve(weight, torch.eye(16, dtype=torch.float64), pattern("2:4"), "sparsegpt")
    plain = solve(weight, None, pattern("2:4"), "magnitude")
    torch.testing.assert_close(swept.weight, plain.weight)


def test_the_sweep_is_the_best_update_for_its_last_column():
    """With all but one column kept, the rest must be the least squares solution."""
    weight, moment = correlated(5, 8)
    mask = torch.ones(5, 8, dtype=torch.bool)
    mask[:, 0] = False
    found = sweep(weight, moment, Masking((5, 8), mask=mask), damping=1e-9)
    free = moment[1:, 1:]
    best = torch.linalg.solve(free, (moment[1:] @ weight.T)).T
    # The damping of 1e-9 is all that lies between them.
    torch.testing.assert_close(found.weight[:, 1:], best, rtol=1e-5, atol=1e-6)


# -- programs ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def data(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_layers_have_the_pattern_along_channels(net, method):
    batches = data()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = tl.compile(
        net, [SparsifyNM(method=method)], (batches[0],), calibration=batches, measure_latency=False
    )
    record = found.program.history[0]
    assert record.statistics["layers"] == 2
    weight = found.program.tensor("second.weight")
    assert bool((weight.unflatten(1, (-1, 4)) != 0).sum(2).le(2).all())
    assert bool((found.program.tensor("head.weight").unflatten(1, (-1, 4)) != 0).sum(2).le(2).all())
    assert torch.equal(found.program.tensor("first.weight"), before["first.weight"])
    warned = [line["message"] for line in record.diagnostics if line["severity"] == "warning"]
    assert any("3 columns are no multiple of 4: first.weight" in line for line in warned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_sparsegpt_is_best_where_it_counts(net):
    batches = data()
    reference = net(batches[-1])
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        found = tl.compile(
            net,
            f"sparsify-nm{{method={method}}}",
            (batches[0],),
            calibration=batches[:-1],
            measure_latency=False,
        )
        errors[method] = float((found(batches[-1]) - reference).detach().square().sum())
    assert errors["sparsegpt"] < errors["magnitude"]


def test_moments_are_those_of_what_the_changed_layers_give(net):
    batches = data(2)
    program = tl.capture(net, (batches[0],))
    readers = [r for r in readers_of(program).values() if r.weight != "first.weight"]
    seen = {}
    for arrival in arrivals(program, [[b] for b in batches], readers):
        seen[arrival.reader.weight] = arrival
        if arrival.reader.weight == "second.weight":
            with program.edit() as edit:
                edit.set_tensor("second.weight", torch.zeros(16, 8, 3, 3))
    # Zero weights leave the constant that batch norm makes of the bias.
    with torch.no_grad():
        net.second.weight.zero_()
        rows = torch.cat(
            [
                torch.relu(net.norm(net.second(torch.relu(net.first(b))))).mean((2, 3))
                for b in batches
            ]
        ).double()
    torch.testing.assert_close(
        seen["head.weight"].moments[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-9
    )
    assert [moment.shape for moment in seen["second.weight"].moments] == [(72, 72)] * 2
    assert seen["second.weight"].counts == (2 * 8 * 64,) * 2


def test_zeros_stay_while_healing(net):
    batches = data()
    found = tl.compile(
        net,
        "sparsify-nm{method=magnitude},heal{steps=12,lr=0.001}",
        (batches[0],),
        calibration=batches,
        measure_latency=False,
    )
    sparse = tl.compile(
        net, "sparsify-nm{method=magnitude}", (batches[0],), measure_latency=False
    ).program.tensor("second.weight")
    healed = found.program.tensor("second.weight")
    assert torch.equal(healed != 0, sparse != 0)
    assert not torch.equal(healed, sparse)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    found = tl.compile(Tied().eval(), "sparsify-nm", (torch.randn(64, 8),), measure_latency=False)
    state = found.state_dict()
    assert torch.equal(state["one.weight"], state["two.weight"])
    assert float((state["one.weight"] == 0).sum()) == 32


@pytest.mark.parametrize("asked", ["false", "true"])
def test_embeddings_are_taken_when_asked_for(asked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 8)).eval()
    batches = [torch.randint(20, (4, 6)) for _ in range(3)]
    spec = f"sparsify-nm{{embeddings={asked}}}"
    after = tl.PassManager(spec).run(tl.capture(model, (batches[0],)), calibration=batches)
    methods = {row["layer"]: row["method"] for row in after.history[-1].details["sparse"]}
    assert methods["1.weight"] == "sparsegpt"
    # What looks rows up has no second moment.
    assert methods.get("0.weight") == ("magnitude" if asked == "true" else None)
    kept = after.tensor("0.weight").unflatten(1, (-1, 4)) != 0
    assert bool((kept.sum(2) == (2 if asked == "true" else 4)).all())


def test_bad_weights_and_few_rows(net):
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        net.head.weight[0, 0] = math.nan
    with pytest.raises(tl.Error, match=r"head\.weight"):
        tl.compile(net, "sparsify-nm", (x,), measure_latency=False)
    with torch.no_grad():
        net.head.weight[0, 0] = 1.0
        net.head.weight[1] = 0.0
    found = tl.compile(net, "sparsify-nm", (x,), calibration=[x], measure_latency=False)
    told = [line["message"] for line in found.program.history[0].diagnostics]
    assert "2 rows of calibration data for 16 columns: the rest is damped" in told
    assert bool(torch.isfinite(found(x)).all())
    assert issubclass(InputError, tl.Error)


def test_a_pattern_that_fits_nothing_changes_nothing(net):
    x = torch.randn(2, 3, 8, 8)
    found = tl.compile(net, "sparsify-nm{pattern=7:13}", (x,), measure_latency=False)
    record = found.program.history[0]
    assert not record.changed
    assert record.diagnostics[0]["message"] == "there is no layer that the pattern fits"


@pytest.mark.parametrize(
    ("text", "block", "told"),
    [
        ("block", 64, "unless fuse-kernels after this puts block_sparse_linear where it is faster"),
        ("block", 32, "run as dense ones: no op takes this pattern"),
        ("2:4", 32, "on a GPU fuse-kernels takes semi_structured_linear where a table"),
        ("4:8", 32, "run as dense ones: no op takes this pattern"),
        ("unstructured", 32, "run as dense ones: no op takes this pattern"),
    ],
)
def test_what_zeros_run_as(text, block, told):
    program = tl.capture(torch.nn.Linear(512, 512).eval(), (torch.randn(4, 512),))
    spec = f"sparsify-nm{{pattern={text},block={block},sparsity=0.8,method=magnitude}}"
    found = tl.PassManager(f"{spec},fuse-kernels{{choose=rule,device=cpu}}").run(program)
    assert told in found.history[0].diagnostics[-1]["message"]
    # The one pattern for which another op is promised gets it.
    fused = "block_sparse_linear" in found.to_text()
    assert fused == ("block_sparse_linear" in told)


def test_a_transformer_with_transposed_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    model.config.use_cache = False
    batches = [{"input_ids": torch.randint(50, (4, 16))} for _ in range(3)]
    found = tl.compile(
        model,
        "sparsify-nm{exclude=[lm_head]}",
        (),
        example_kwargs=batches[0],
        calibration=batches,
        measure_latency=False,
    )
    weight = found.program.tensor("transformer.h.0.mlp.c_fc.weight")  # (in, out)
    assert bool((weight.T.unflatten(1, (-1, 4)) != 0).sum(2).le(2).all())
    error = found.program.history[0].statistics
    assert error["mean_error"] < error["mean_error_magnitude"]


def test_relative_error_is_what_solve_tells():
    weight, moment = correlated(6, 8)
    one = solve(weight, moment, pattern("2:4"), "wanda")
    assert one.error == relative_error(weight, one.weight, moment)


# -- with fewer bits ---------------------------------------------------------------------------


def test_zeros_and_bits_in_one_sweep(net):
    batches = data()
    errors = {}
    for name, text in {
        "joint": "quantize{scheme=w4a16,group=0,method=gptq,pattern=2:4}",
        "one after the other": "sparsify-nm,quantize{scheme=w4a16,group=0,method=gptq}",
        "nearest": "sparsify-nm{method=magnitude},quantize{scheme=w4a16,group=0}",
    }.items():
        found = tl.PassManager(text).run(tl.capture(net, (batches[0],)), calibration=batches)
        weights = [n for n in found.nodes if "dequantize.default" in str(n.target)]
        assert len(weights) == 3
        errors[name] = float((found.run(batches[-1]) - net(batches[-1])).detach().norm())
        for node in weights:
            weight = _dequantised(found, node)
            if weight.shape[1] % 4 == 0:  # of convolutions the channels
                channels = weight.movedim(1, -1).unflatten(-1, (-1, 4))
                assert bool((channels != 0).sum(-1).le(2).all())
    assert errors["joint"] < errors["nearest"]
    assert errors["one after the other"] < errors["nearest"]


def test_a_pattern_is_chosen_in_the_order_of_columns(net):
    batches = data()
    program = tl.capture(net, (batches[0],))
    notes, weights = [], []
    for ordered in ("true", "false"):
        spec = f"quantize{{method=gptq,pattern=2:4,act_order={ordered},include=[second,head]}}"
        after = tl.PassManager(spec).run(program, calibration=batches)
        told = after.history[-1].diagnostics
        notes.append([d["severity"] for d in told if "act_order is without" in d["message"]])
        weights.append(after.tensor("head.weight"))
    assert notes == [["note"], []]
    assert torch.equal(*weights)


def _dequantised(program, node):
    """The weight as its reader has it."""
    from torchlathe.ir.provenance import info

    args = [program.tensor(info(a).tensor) if hasattr(a, "op") else a for a in node.args]
    weight = node.target(*args)
    (user,) = node.users
    return weight.view(user.args[1]) if "view" in str(user.target) else weight


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4"},
        {"pattern": "block", "method": "gptq"},
        {"pattern": "x", "method": "gptq"},
    ],
    ids=["nearest", "block", "none"],
)
def test_patterns_that_a_rounding_sweep_does_not_take(options):
    from torchlathe.passes import Quantize

    with pytest.raises(OptionError):
        Quantize(**options)
