"""Erasing branches: exact against zeros, valid in any order, and as much as was asked for."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from tests.passes.stacked_unets import StackedUnets
from torchlathe.ir import InputError, OptionError, PassError, PreconditionError, Program
from torchlathe.ir.verifying import check_equivalence, verify
from torchlathe.passes import EraseOperators, Segments, StructuredErase
from torchlathe.passes.analysis.branches import Branch
from torchlathe.passes.analysis.segments import SegmentGraph
from torchlathe.passes.rewrite.branches.leave_out import erase_branches
from torchlathe.passes.rewrite.branches.liveness import Liveness

# Both sides run in float64 and differ in the order of sums at most.
EXACT = 1e-9


def branch_of(graph: SegmentGraph, name: str) -> Branch:
    branch = graph.by_name(name).branch
    assert branch is not None
    return branch


def valid_subset(program: Program, seed: int) -> list[Branch]:
    """Branches that can go together, drawn at random."""
    graph = program.analysis(Segments)
    liveness = Liveness(program, graph)
    branches = [b for b in graph.branches if not b.reason]
    random.Random(seed).shuffle(branches)
    few = branches[: random.Random(seed).randint(1, max(1, len(branches)))]
    return [b for b in few if not liveness.take(b)]


def erased(program: Program, seed: int) -> None:
    """Erase a valid subset of a copy, and hold the copy to all that it promises."""
    copy = program.copy()
    chosen = valid_subset(copy, seed)
    if not chosen:
        return
    liveness = Liveness(copy, copy.analysis(Segments))
    assert not any(liveness.take(branch) for branch in chosen)
    before = sum(t.numel() for t in program.parameters.values())
    reference = erase_branches(copy, chosen)
    verify(copy, "full")
    assert sum(t.numel() for t in copy.parameters.values()) == before - liveness.parameters
    found = check_equivalence(program, copy, reference=reference)
    assert found.passed, found.detail
    assert found.max_rel_error < EXACT


# -- StackedUnets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unets() -> Program:
    return tl.capture(StackedUnets().double().eval(), (torch.randn(2, 3, 16, 16).double(),))


def test_the_published_subnetwork(unets: Program) -> None:
    program = unets.copy()
    graph = program.analysis(Segments)
    names = ("one.up2", "two.up2", "two.up1", "two.out")
    reference = erase_branches(program, [branch_of(graph, name) for name in names])
    left = program.analysis(Segments)
    # 0-12, 24, 25, 26-33, 34, 35-38 and 77-82: 20 and 76 had one operand left, and all of the
    # second U-Net was needed by nobody. 35-38 and 77-82 are one chain without the joint between.
    assert {s.name: len(s.nodes) for s in left} == {
        "one.stem": 5,
        "one.down1": 3,
        "one.down2": 6,  # with the resize, which is not beside another branch any more
        "one.add": 1,
        "one.up1": 5,
        "one.add/2": 1,
        "one.out..head": 8,
    }
    assert {name.partition(".")[0] for name in program.entries} == {"one", "head"}
    assert {name.partition(".")[0] for name in program.carried} == {"one"}
    found = check_equivalence(unets, program, reference=reference)
    assert found.max_rel_error < 1e-12


def test_the_cascade_counts(unets: Program) -> None:
    graph = unets.analysis(Segments)
    liveness = Liveness(unets, graph)
    assert liveness.cost_of(branch_of(graph, "two.out")) == (
        sum(p.numel() for p in StackedUnets().two.parameters()),
        0,  # no FLOPs were given
    )
    assert not liveness.take(branch_of(graph, "two.up1"))
    first = liveness.parameters
    assert not liveness.take(branch_of(graph, "two.out"))
    assert liveness.parameters > first
    assert liveness.take(branch_of(graph, "two.up2")) == "it is gone already"
    assert "no operand left" in liveness.take(branch_of(graph, "one.out"))


def test_a_joint_keeps_an_operand(unets: Program) -> None:
    graph = unets.analysis(Segments)
    both = [branch_of(graph, "one.out"), branch_of(graph, "two.out")]
    before = unets.to_text()
    with pytest.raises(InputError, match=r"two cannot be erased: .* would have no operand left"):
        erase_branches(unets, both)
    with pytest.raises(InputError, match="cannot be erased: it is not zero when"):
        erase_branches(unets, [branch_of(graph, "one.add")])
    with pytest.raises(InputError, match="a branch of another program"):
        erase_branches(unets.copy(), both)
    assert unets.to_text() == before


@pytest.mark.parametrize("seed", range(6))
def test_every_order_of_the_unets(unets: Program, seed: int) -> None:
    erased(unets, seed)


# -- networks of libraries -------------------------------------------------------------------------


def _library(path: str, *args: Any, **options: Any) -> nn.Module:
    module, _, name = path.rpartition(".")
    model: nn.Module = getattr(importlib.import_module(module), name)(*args, **options)
    return model


def _transformer(model: str, config: str, **options: Any) -> nn.Module:
    transformers = importlib.import_module("transformers")
    made: nn.Module = getattr(transformers, model)(
        getattr(transformers, config)(**options, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )
    return made


def _ids(batch: int) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, 50, (batch, 7)),
        "attention_mask": torch.ones(batch, 7, dtype=torch.int64),
    }


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
# Builder, inputs by batch, and a branch that must be there.
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], str]] = {
    "resnet18": (
        lambda: _library("torchvision.models.resnet18", num_classes=5),
        lambda batch: torch.randn(batch, 3, 32, 32),
        "layer3.1.conv1..bn2",
    ),
    "densenet": (
        lambda: _library("torchvision.models.DenseNet", 4, (2, 2), 8, 2, num_classes=5),
        lambda batch: torch.randn(batch, 3, 32, 32),
        "features.denseblock1.denselayer2",
    ),
    "squeezenet": (
        lambda: _library("torchvision.models.squeezenet1_1", num_classes=5),
        lambda batch: torch.randn(batch, 3, 48, 48),
        "features.4.expand3x3",
    ),
    "mobilenet-with-gates": (
        lambda: _library("timm.create_model", "mobilenetv3_small_050", num_classes=5),
        lambda batch: torch.randn(batch, 3, 32, 32),
        "blocks.2.1.conv_pw..bn3",
    ),
    "googlenet": (
        lambda: _library(
            "torchvision.models.googlenet", num_classes=5, aux_logits=False, init_weights=False
        ),
        lambda batch: torch.randn(batch, 3, 32, 32),
        "inception4a.branch2",
    ),
    "bert": (
        lambda: _transformer(
            "BertForSequenceClassification", "BertConfig", intermediate_size=32, **SIZES
        ),
        _ids,
        "bert.encoder.layer.1.attention.self..output.dense",
    ),
    "gpt2": (
        lambda: _transformer(
            "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=4, vocab_size=50,
            use_cache=False,
        ),
        _ids,
        "transformer.h.1.ln_2..mlp",
    ),
    "llama": (
        lambda: _transformer(
            "LlamaForCausalLM", "LlamaConfig", intermediate_size=32, num_key_value_heads=2,
            use_cache=False, **SIZES,
        ),
        _ids,
        "model.layers.1.input_layernorm..self_attn",
    ),
}  # fmt: skip
QUICK = ("densenet", "bert", "llama")


def _captured(name: str) -> tuple[nn.Module, Any, Callable[[int], Any]]:
    make, inputs, _ = NETS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms begin as zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = inputs(2)
    example = {"example_kwargs": given} if isinstance(given, dict) else {"example_inputs": (given,)}
    return model, example, inputs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NETS]
)
def test_library_networks(name: str) -> None:
    model, example, inputs = _captured(name)
    model.double()
    shapes = {key: {0: torch.export.Dim.AUTO} for key in example.get("example_kwargs", ())}
    example = {
        key: {k: _double(v) for k, v in value.items()} if isinstance(value, dict)
        else tuple(map(_double, value))
        for key, value in example.items()
    }  # fmt: skip
    program = tl.capture(
        model,
        example.get("example_inputs", ()),
        example_kwargs=example.get("example_kwargs"),
        dynamic_shapes=shapes or "auto",
    )
    graph = program.analysis(Segments)
    assert NETS[name][2] in {b.name for b in graph.branches if not b.reason}
    for seed in range(3):
        copy = program.copy()
        chosen = valid_subset(copy, seed)
        reference = erase_branches(copy, chosen)
        verify(copy)
        for batch in (2, 3):
            given = inputs(batch)
            args = () if isinstance(given, dict) else (_double(given),)
            kwargs = given if isinstance(given, dict) else {}
            found = check_equivalence(program, copy, reference=reference, inputs=(args, kwargs))
            assert found.passed, found.detail
            assert found.max_rel_error < EXACT


def _double(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value


def test_a_compiled_resnet_equals_its_twin_and_lost_whole_layers() -> None:
    model, example, inputs = _captured("resnet18")
    compiled = tl.compile(
        model, "erase-operators{sparsity=0.5}", **example, dynamic_shapes="auto",
        measure_latency=False,
    )  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for p in compiled.parameters())
    # The largest branch is 42 % of the network; what is erased ends within half of that of 50 %.
    assert abs(left / total - 0.5) < 0.21
    twin = compiled.zeroed_reference(model)
    gone = set(model.state_dict()) - set(compiled.state_dict())
    assert any(name.endswith("conv1.weight") for name in gone)
    assert any(name.endswith("num_batches_tracked") for name in gone)
    for batch in (2, 5):
        x = inputs(batch)
        # float32 on both sides; the kept ops are the same, so that only their order may differ.
        torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)


# -- small networks --------------------------------------------------------------------------------


class _Mlp(nn.Module):
    def __init__(self, width: int, out: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width + 2), nn.Linear(width + 2, out or width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


class _Add(nn.Module):
    """A residual branch; by ``kind`` a sum, a difference, or a scaled sum."""

    def __init__(self, width: int, kind: int) -> None:
        super().__init__()
        self.kind, self.branch, self.norm = kind, _Mlp(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(self.norm(x))
        return [
            lambda: x + y, lambda: x - y, lambda: y - x,
            lambda: torch.add(x, y, alpha=0.5), lambda: torch.sub(y, x, alpha=2),
        ][self.kind]()  # fmt: skip


class _Two(nn.Module):
    """Two branches on one stream, one of them with a branch of its own."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.inner = _Mlp(width), nn.Linear(width, width), inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) + self.a(x) + self.b(self.inner(torch.sin(x)))


class _Cat(nn.Module):
    """Branches side by side; what reads them is a layer, through a norm or not."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, 3), _Mlp(width, 4), nn.Linear(width, 5)
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.out = nn.Linear(12, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.a(x), torch.relu(self.b(x)), self.c(x)], -1)
        return self.out(torch.relu(self.norm(joined)))


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.scale = _Mlp(width), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.gate(x)) + torch.sigmoid(self.scale * torch.sin(x))


class _Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v))


BLOCKS: tuple[Callable[[int], nn.Module], ...] = (
    *(lambda width, kind=kind: _Add(width, kind) for kind in range(5)),
    lambda width: _Two(width, nn.Identity()),
    lambda width: _Two(width, _Add(width, 0)),
    lambda width: _Two(width, _Cat(width, norm=False)),
    lambda width: _Cat(width, norm=False),
    lambda width: _Cat(width, norm=True),
    _Gate,
    _Attend,
)


def _network(kinds: list[int]) -> nn.Sequential:
    torch.manual_seed(len(kinds))
    blocks = [BLOCKS[kind](6) for kind in kinds]
    return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 3)).double().eval()


@hypothesis.given(
    kinds=st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=5),
    seeds=st.lists(st.integers(0, 10**6), min_size=4, max_size=4),
)
@hypothesis.settings(max_examples=10)
def test_erasing_any_valid_subset_is_zeroing(kinds: list[int], seeds: list[int]) -> None:
    program = tl.capture(_network(kinds), (torch.randn(2, 3, 4).double(),))
    for seed in seeds:
        erased(program, seed)


@pytest.mark.parametrize("kind", range(len(BLOCKS)))
def test_each_block(kind: int) -> None:
    program = tl.capture(_network([kind]), (torch.randn(2, 3, 4).double(),))
    assert any(not branch.reason for branch in program.analysis(Segments).branches)
    for seed in range(3):
        erased(program, seed)


def test_what_reads_a_concatenation_shrinks() -> None:
    model = _network([8])
    compiled = tl.compile(
        model, "erase-operators{include=[1.b]}", (torch.randn(2, 4).double(),),
        measure_latency=False,
    )  # fmt: skip
    assert compiled.kept["1.out.weight"][1].tolist() == [0, 1, 2, 7, 8, 9, 10, 11]
    x = torch.randn(5, 4).double()[:2]
    torch.testing.assert_close(
        compiled(x), compiled.zeroed_reference(model)(x), rtol=EXACT, atol=EXACT
    )


def test_a_concatenation_of_one_is_that_one() -> None:
    model = _network([8])
    compiled = tl.compile(
        model, "erase-operators{count=2,importance=magnitude,exclude=[1.a]}",
        (torch.randn(2, 4).double(),), measure_latency=False,
    )  # fmt: skip
    targets = [str(n.target) for n in compiled.program.nodes if n.op == "call_function"]
    assert not any("cat" in target for target in targets)
    x = torch.randn(2, 4).double()
    torch.testing.assert_close(
        compiled(x), compiled.zeroed_reference(model)(x), rtol=EXACT, atol=EXACT
    )


# -- constants -------------------------------------------------------------------------------------


def test_gates_are_left_alone_by_default() -> None:
    compiled = tl.compile(
        _network([10]), "erase-operators{include=[1.*]}", (torch.randn(2, 4).double(),),
        measure_latency=False,
    )  # fmt: skip
    record = compiled.report.passes[0]
    text = str(record)
    assert "there is no branch that may be erased" in text
    assert "it holds 0.5 when its parameters are zero; constants=true" in text


def test_a_gate_leaves_its_constant() -> None:
    model = _network([10])
    compiled = tl.compile(
        model, "erase-operators{count=2,constants=true}", (torch.randn(2, 4).double(),),
        measure_latency=False,
    )  # fmt: skip
    assert set(compiled.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    x = torch.randn(2, 4).double()
    twin = compiled.zeroed_reference(model)
    assert twin.get_parameter("1.scale").item() == 0.0
    torch.testing.assert_close(compiled(x), twin(x), rtol=EXACT, atol=EXACT)


# -- budgets and scores ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def residual() -> Program:
    """Five blocks with one branch each, of the same size."""
    return tl.capture(_network([0] * 5), (torch.randn(2, 3, 4).double(),))


def _left(program: Program, spec: EraseOperators, **given: Any) -> Program:
    return tl.PassManager([spec]).run(program, **given)


def _names_left(program: Program) -> set[str]:
    return {name.split(".")[0] for name in program.parameters}


@pytest.mark.parametrize("count", [1, 3, 5])
def test_count(residual: Program, count: int) -> None:
    left = _left(residual, EraseOperators(count=count))
    assert len(_names_left(left)) == 7 - count
    assert left.history[-1].statistics["erased_branches"] == count


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.75, 0.95])
def test_sparsity(residual: Program, share: float) -> None:
    left = _left(residual, EraseOperators(sparsity=share))
    before, after = (sum(t.numel() for t in p.parameters.values()) for p in (residual, left))
    # All branches are 18 % of the network: the nearest multiple of it, but never all but 10 %.
    branch = 122 / before
    want = min(5, round(share / branch)) * branch
    assert 1 - after / before == pytest.approx(want)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.81, 1.0])
def test_params_to_keep(residual: Program, budget: float) -> None:
    left = _left(residual, EraseOperators(params=budget))
    before, after = (sum(t.numel() for t in p.parameters.values()) for p in (residual, left))
    assert after <= budget * before
    assert after + 122 > budget * before  # and not one branch more


def test_flops_to_keep(residual: Program) -> None:
    left = _left(residual, EraseOperators(flops="50%"))
    assert left.cost().flops_at() <= 0.5 * residual.cost().flops_at()


def test_a_budget_out_of_reach_is_said(residual: Program) -> None:
    left = _left(residual, EraseOperators(params=0.01))
    (told,) = (d for d in left.history[-1].diagnostics if d["severity"] == "warning")
    assert "asked to erase" in told["message"]
    assert _names_left(left) == {"0", "6"}


def test_keep_at_least(residual: Program) -> None:
    assert len(_names_left(_left(residual, EraseOperators(count=5, keep_at_least=2)))) == 4
    assert len(_names_left(_left(residual, EraseOperators(count=5, keep_at_least=0.5)))) == 5


def test_given_scores_decide(residual: Program) -> None:
    names = [b.name for b in residual.analysis(Segments).branches]
    wanted = dict(zip(names, [3.0, 1.0, 2.0, 5.0, float("inf")], strict=True))
    left = _left(residual, EraseOperators(count=2, importance=wanted))
    assert _names_left(left) == {"0", "1", "4", "5", "6"}
    left = _left(residual, EraseOperators(count=9, importance=lambda b, p: wanted[b.name]))
    assert _names_left(left) == {"0", "5", "6"}


def test_output_change_finds_the_branch_that_does_nothing() -> None:
    model = _network([0] * 5)
    with torch.no_grad():
        model.get_parameter("3.branch.down.weight").mul_(1e-3)
        model.get_parameter("3.branch.down.bias").mul_(1e-3)
        model.get_parameter("3.branch.up.weight").mul_(30)
        model.get_parameter("2.branch.down.weight").mul_(0.01)
        model.get_parameter("2.branch.down.bias").mul_(3)
    program = tl.capture(model, (torch.randn(2, 3, 4).double(),))
    data = [torch.randn(2, 3, 4).double() for _ in range(2)]
    left = _left(program, EraseOperators(importance="output-change"), calibration=data)
    assert "3" not in _names_left(left)
    # Its weights are the largest, so that their mean square says otherwise.
    assert "3" in _names_left(_left(program, EraseOperators(importance="magnitude")))


def test_output_change_is_the_distance_of_the_outputs(residual: Program) -> None:
    from torchlathe.passes.base import PassContext
    from torchlathe.passes.rewrite.branches.leave_out import zeroed_by
    from torchlathe.passes.rewrite.branches.scores import branch_scores

    program = tl.capture(_network([7, 9, 10]), (torch.randn(2, 3, 4).double(),))
    branches = [b for b in program.analysis(Segments).branches if not b.reason]
    found = branch_scores(program, branches, "output-change", PassContext(program))
    args, _ = program.example_inputs
    whole = program.run(*args)
    for branch, score in found.items():
        without = program.run(*args, replace_tensor=zeroed_by(program, [branch]))
        # float64, and the same ops on both sides
        assert score == pytest.approx(((whole - without).norm() / whole.norm()).item(), rel=1e-9)


def test_taylor_estimates_the_loss(residual: Program) -> None:
    def loss(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.square().mean()

    data = [torch.randn(2, 3, 4).double() for _ in range(2)]
    left = _left(residual, EraseOperators(importance="taylor"), calibration=data, loss=loss)
    assert len(_names_left(left)) == 6
    with pytest.raises((PreconditionError, PassError), match="loss"):
        _left(residual, EraseOperators(importance="taylor"), calibration=data)


def test_random_follows_the_seed(residual: Program) -> None:
    def names(seed: int) -> set[str]:
        return _names_left(_left(residual, EraseOperators(importance="random"), seed=seed))

    assert names(1) == names(1)
    assert len({frozenset(names(seed)) for seed in range(8)}) > 1


def test_many_branches_go_by_magnitude(residual: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchlathe.passes.rewrite.branches.scores.FEW", 4)
    assert _left(residual, EraseOperators()).history[-1].statistics["importance"] == "magnitude"


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0, but must be in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"count": 0}, "count is 0, but must be at least 1"),
        ({"count": 2, "sparsity": 0.5}, "sparsity and count all say how much"),
        ({"params": 0.0}, "params is 0.0, but must be above 0"),
        ({"flops": "3 cows"}, "flops is 3 cows"),
        ({"keep_at_least": -1}, "keep_at_least is -1"),
        ({"keep_at_least": 1.5}, "keep_at_least is 1.5"),
        ({"importance": "magnitud"}, "importance='magnitud' is not known"),
        ({"count": "two"}, "count of erase-operators: expected"),
    ],
    ids=["all", "negative", "none", "two", "no-params", "unit", "less", "part", "name", "type"],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EraseOperators(**options)


def test_a_pattern_that_matches_nothing_is_an_error(residual: Program) -> None:
    with pytest.raises(PassError, match="the pattern 'blokc' matches no branch") as raised:
        _left(residual, EraseOperators(include=("blokc",)))
    assert "branches are 1" in str(raised.value)


@pytest.mark.parametrize(
    "pattern", ["3", "3.branch.up.weight", "3.norm..branch", "3.bra*", "3.norm"]
)
def test_patterns(residual: Program, pattern: str) -> None:
    only = _left(residual, EraseOperators(count=5, include=(pattern,)))
    assert _names_left(only) == {"0", "1", "2", "4", "5", "6"}
    others = _left(residual, EraseOperators(count=5, exclude=(pattern,)))
    assert _names_left(others) == {"0", "3", "6"}


def test_text_form() -> None:
    made = EraseOperators(count=2, include=("layer.*",), importance="magnitude")
    text = str(made)
    assert text == "erase-operators{count=2,importance=magnitude,include=[layer.*]}"
    assert tl.PassManager(text).passes == (made,)


def test_fake_weights_have_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 6), _Add(6, 0), nn.Linear(6, 3)).eval()
        program = tl.capture(model, (torch.randn(2, 4),))
    with pytest.raises(PassError, match="asks for values"):
        _left(program, EraseOperators())
    assert _names_left(_left(program, EraseOperators(importance="random"))) == {"0", "2"}


# -- with others -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "structured-erase{sparsity=0.3},erase-operators{count=2}",
        "erase-operators{count=2},structured-erase{sparsity=0.3}",
        "erase-operators,structured-erase{sparsity=0.3},erase-operators",
    ],
    ids=["after", "before", "between"],
)
def test_composes_with_structured_erase(spec: str) -> None:
    model = _network([0, 8, 11, 0])
    x = torch.randn(2, 3, 4).double()
    compiled = tl.compile(model, spec, (x,), measure_latency=False)
    twin = compiled.zeroed_reference(model)
    x = torch.randn(2, 3, 4).double()
    torch.testing.assert_close(compiled(x), twin(x), rtol=EXACT, atol=EXACT)


def test_requires_nothing_of_a_model_without_branches() -> None:
    program = tl.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    left = _left(program, EraseOperators())
    assert not left.history[-1].changed
    assert "no branch" in left.history[-1].diagnostics[0]["message"]


def test_a_saved_model_keeps_what_was_zeroed(tmp_path: Any) -> None:
    model = _network([0, 8])
    x = torch.randn(2, 3, 4).double()
    compiled = tl.compile(model, "erase-operators{count=2}", (x,), measure_latency=False)
    compiled.save(tmp_path / "model.tl")
    loaded = tl.load(tmp_path / "model.tl")
    torch.testing.assert_close(loaded(x), compiled(x), rtol=0, atol=0)
    torch.testing.assert_close(
        loaded.zeroed_reference(model)(x), compiled(x), rtol=EXACT, atol=EXACT
    )
    again = tl.compile(loaded, StructuredErase(sparsity=0.3), (x,), measure_latency=False)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in loaded.parameters())
