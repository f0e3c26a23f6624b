"""low-rank-split on programs: what it splits, what it leaves, and that the graph stays right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from torchlathe import PassManager, capture
from torchlathe.ir import Error, OptionError, Program
from torchlathe.ir.verifying import verify
from torchlathe.passes import LowRankSplit, ZeroInvariantGroups
from torchlathe.passes.rewrite.factorising.choosing import (
    Option,
    choose_exact,
    choose_greedy,
    cost_of,
    loss_of,
    thinned,
)
from torchlathe.passes.rewrite.factorising.sites import Site

M = TypeVar("M", bound=nn.Module)


class Attention(nn.Module):
    """Three layers that read the same input, and a feed-forward part."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return x + self.down(torch.relu(self.up(x)))


class Tied(nn.Module):
    """An embedding whose matrix is the last layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 24, padding_idx=0)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


class Conv(nn.Module):
    """Convolutions of all kinds: strided, dilated, grouped, 1 x 1, one-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, stride=(1, 2), padding=(1, 0), dilation=(1, 2))
        self.point = nn.Conv2d(16, 16, 1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, padding="same", groups=2)
        self.line = nn.Conv1d(16, 16, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.grouped(torch.relu(self.point(torch.relu(self.first(x))))))
        return self.line(x.flatten(2))


def decayed(model: M) -> M:
    """With singular values that fall, as those of trained layers do."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                left, values, right = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
                values = values * torch.logspace(0, -2, len(values))
                parameter.copy_((left * values @ right).reshape(parameter.shape))
    return model.eval()


def captured(model: nn.Module, *inputs: torch.Tensor) -> Program:
    return capture(model, inputs, dynamic_shapes="auto")


def batches(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(8, 10, 32) for _ in range(count)]


def run(spec: str, program: Program, **data: Any) -> Program:
    after = PassManager(spec).run(program, **data)
    verify(after, "full")
    return after


def messages(program: Program) -> str:
    return "\n".join(f"{d['name']}: {d['message']}" for d in program.history[-1].diagnostics)


ATTENTION = [
    "low-rank-split{method=svd}",
    "low-rank-split",
    "low-rank-split{allocation=uniform,joint=true}",
    "low-rank-split{allocation=greedy,weigh=layer}",
    "low-rank-split{method=mixed}",
    "low-rank-split{rank=4}",
    "low-rank-split{params=0.5}",
    "low-rank-split{bytes=0.5}",
    "low-rank-split{flops=0.6}",
    "low-rank-split{allocation=uniform,flops=0.6}",
]


@pytest.mark.parametrize("spec", ATTENTION)
def test_every_way_keeps_within_its_budget_and_near_the_outputs(spec: str) -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    before = program.cost()
    after = run(spec, program, calibration=batches())
    record, cost = after.history[-1], after.cost()
    assert record.changed
    assert cost.parameters < before.parameters
    share = 0.61 if "flops" in spec else 0.5 * 1.02  # biases are not the layers'
    assert record.statistics["kept_of_layers"] <= share * record.statistics["parameters_of_layers"]
    if "params" in spec:
        assert cost.parameters <= 0.5 * before.parameters
    if "bytes" in spec:
        assert cost.bytes <= 0.5 * before.bytes
    if "flops" in spec:
        assert cost.flops_at() <= 0.6 * before.flops_at()
    x = torch.randn(4, 10, 32)
    error = (after.run(x) - program.run(x)).norm() / program.run(x).norm()
    assert error < 0.35  # a random answer would be off by about 1


def test_full_rank_would_not_save_and_nothing_is_ever_larger() -> None:
    program = captured(Attention(), torch.randn(2, 10, 32))
    after = run("low-rank-split{rank=16,method=svd,exclude=[up,down]}", program)
    assert not after.history[-1].changed  # 16 * 64 = 32 * 32
    assert "its factors would not be smaller: query.weight" in messages(after)
    smaller = run("low-rank-split{rank=15,method=svd}", program)
    assert smaller.history[-1].statistics["split"] == 5
    assert smaller.tensor("query.down.weight").shape == (15, 32)


def test_the_error_that_is_told_is_that_of_the_outputs() -> None:
    model = decayed(Attention())
    data = batches()
    program = captured(model, data[0])
    after = run("low-rank-split{rank=6,include=[query],damping=0}", program, calibration=data)
    down, up = after.tensor("query.down.weight"), after.tensor("query.up.weight")
    bias = after.tensor("query.bias")
    rows = torch.cat(data).flatten(0, 1)
    wanted = model.query(rows).detach()
    gap = rows @ down.T @ up.T + bias - wanted
    # The bias takes up the mean, so the error is relative to the variance.
    told = float(gap.detach().square().sum() / (wanted - wanted.mean(0)).square().sum())
    statistic = float(after.history[-1].statistics["mean_error"])
    assert statistic == pytest.approx(told, rel=1e-4)  # float32 factors
    assert gap.mean(0).abs().max() < 1e-5
    assert not torch.equal(bias, model.query.bias)
    plain = run("low-rank-split{rank=6,include=[query],method=svd}", program)
    other = rows @ plain.tensor("query.down.weight").T @ plain.tensor("query.up.weight").T
    assert gap.square().sum() < (other + model.query.bias - wanted).square().sum()
    assert torch.equal(plain.tensor("query.bias"), model.query.bias)


def test_the_graph_shows_two_linears_with_names_and_provenance() -> None:
    program = captured(Attention(), torch.randn(2, 10, 32))
    after = run("low-rank-split{rank=4,include=[key],method=svd}", program)
    assert {"key.down.weight", "key.up.weight", "key.bias"} <= after.parameters.keys()
    assert "key.weight" not in after.entries
    assert after.rewritten >= {"key.down.weight", "key.up.weight"}
    nodes = after.tensor_nodes
    (first,) = nodes["key.down.weight"].users
    (second,) = nodes["key.up.weight"].users
    assert second.args[0] is first
    assert second.args[2] is nodes["key.bias"]
    assert {tl.ir.info(n).created_by for n in (first, second)} == {
        "low-rank-split{rank=4,include=[key],method=svd}"
    }
    assert tl.ir.module_path(first) == "key"


def test_joint_layers_share_one_factor() -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    spec = "low-rank-split{rank=6,joint=true}"
    after = run(spec, program, calibration=batches())
    shared = after.tensor_nodes["query_key_value.down.weight"]
    assert after.tensor("query_key_value.down.weight").shape == (6, 32)
    (call,) = shared.users
    assert len(call.users) == 3
    assert after.history[-1].statistics["joint"] == 3
    assert "query.weight: rank 6 by whitened-svd, with key.weight, value.weight" in messages(after)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker"])
def test_convolutions(form: str) -> None:
    program = captured(decayed(Conv()), torch.randn(2, 8, 9, 12))
    data = [torch.randn(4, 8, 9, 12) for _ in range(3)]
    spec = f"low-rank-split{{share=0.8,allocation=uniform,convolutions={form}}}"
    after = run(spec, program, calibration=data)
    assert after.history[-1].statistics["split"] == 4
    x = torch.randn(3, 8, 9, 12)
    assert (after.run(x) - program.run(x)).norm() < 0.3 * program.run(x).norm()
    grouped = after.tensor("grouped.down.weight")
    assert grouped.shape[1:] == (8, 3, 3)
    assert grouped.shape[0] % 2 == 0
    mixed = run("low-rank-split{method=mixed,share=0.6}", program, calibration=data)
    assert mixed.history[-1].statistics["kept_of_layers"] <= 0.6 * sum(
        p.numel() for p in program.parameters.values() if p.dim() > 1
    )


def test_a_tied_matrix_is_split_once_for_all_who_read_it() -> None:
    program = captured(decayed(Tied()), torch.randint(0, 60, (2, 7)))
    spec = "low-rank-split{share=0.8,embeddings=true,allocation=uniform,method=svd}"
    after = run(spec, program)
    assert {"embed.up.weight", "embed.down.weight"} <= after.parameters.keys()
    assert len(after.tensor_nodes["embed.up.weight"].users) == 2
    weight = after.tensor("embed.up.weight") @ after.tensor("embed.down.weight")
    low = Tied().eval()
    low.load_state_dict({**decayed(low).state_dict(), "embed.weight": weight}, strict=False)
    ids = torch.randint(0, 60, (3, 7))
    lookup = after.tensor("embed.up.weight")[ids] @ after.tensor("embed.down.weight")
    torch.testing.assert_close(low.embed(ids), lookup)
    x = torch.randn(2, 24)
    direct = F.linear(
        F.linear(x, after.tensor("embed.down.weight")), after.tensor("embed.up.weight")
    )
    torch.testing.assert_close(low.head(x), direct)
    assert (after.run(ids) - program.run(ids)).norm() < 0.4 * program.run(ids).norm()
    kept = run("low-rank-split{share=0.8,allocation=uniform,method=svd}", program)
    assert "embeddings=true splits these too: embed.weight" in messages(kept)


def test_rows_of_an_embedding_count_by_their_use() -> None:
    table = nn.Sequential(nn.Embedding(40, 16)).eval()
    program = captured(table, torch.randint(0, 40, (2, 5)))
    often = [torch.randint(0, 4, (64, 5)) for _ in range(3)]
    after = run("low-rank-split{embeddings=true,rank=4}", program, calibration=often)
    error = after.run(torch.arange(40).reshape(8, 5)) - program.run(torch.arange(40).reshape(8, 5))
    squares = error.square().sum(-1).flatten()
    assert squares[:4].mean() < 0.05 * squares[4:].mean()


def test_fisher_weighted() -> None:
    model = decayed(Attention())
    data = batches()
    program = captured(model, data[0])

    def loss(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs[..., :4].square().mean()  # only four outputs matter

    spec = "low-rank-split{method=fisher-weighted,rank=4,include=[down]}"
    after = run(spec, program, calibration=data, loss=loss)
    product = after.tensor("down.up.weight") @ after.tensor("down.down.weight")
    squares = (product - model.down.weight).square().sum(1)
    assert squares[:4].max() < 1e-6 < squares[4:].min()  # rank 4 holds four rows
    with pytest.raises(Error, match="needs loss"):
        run(spec, program, calibration=data)


def test_ranks_are_a_free_family_that_can_be_erased() -> None:
    program = captured(decayed(Attention()), torch.randn(2, 10, 32))
    split = run("low-rank-split{rank=12,method=svd}", program)
    families = split.analysis(ZeroInvariantGroups)
    assert any("query.down.weight:0" in family.name for family in families)
    pipeline = (
        "low-rank-split{rank=12,method=svd},"
        "structured-erase{sparsity=0.5,include=[*.down.weight:0]}"
    )
    erased = run(pipeline, program)
    assert erased.tensor("query.down.weight").shape[0] < 12
    # The weakest ranks go: what is left is the split of the lower rank, up to rounding.
    rank = erased.tensor("query.down.weight").shape[0]
    direct = run(f"low-rank-split{{rank={rank},method=svd,include=[query]}}", program)
    torch.testing.assert_close(
        erased.tensor("query.up.weight") @ erased.tensor("query.down.weight"),
        direct.tensor("query.up.weight") @ direct.tensor("query.down.weight"),
        rtol=1e-4,
        atol=1e-5,
    )


def test_saved_and_loaded(tmp_path: Path) -> None:
    x = torch.randn(2, 10, 32)
    compiled = tl.compile(
        decayed(Attention()),
        "low-rank-split",
        (x,),
        dynamic_shapes="auto",
        calibration=batches(),
        measure_latency=False,
    )
    compiled.save(tmp_path / "model.tl")
    loaded = tl.load(tmp_path / "model.tl")
    torch.testing.assert_close(loaded(x), compiled(x))
    assert "query.bias" in dict(loaded.named_parameters())


def test_the_module_backend_says_that_it_cannot() -> None:
    with pytest.raises(Error, match=r"query\.down\.weight"):
        tl.compile(
            decayed(Attention()),
            "low-rank-split{method=svd}",
            (torch.randn(2, 10, 32),),
            dynamic_shapes="auto",
            backend="module",
            measure_latency=False,
        )


def test_without_weights_it_says_so() -> None:
    with torch.device("meta"):
        model, x = Attention().eval(), torch.randn(2, 10, 32)
    with pytest.raises(Error, match="needs the values of the weights"):
        run("low-rank-split", captured(model, x))


def test_without_calibration_the_example_inputs_stand_for_it() -> None:
    program = captured(decayed(Attention()), torch.randn(8, 10, 32))
    after = run("low-rank-split", program)
    assert "no calibration data was given" in messages(after)
    assert after.history[-1].changed


@pytest.mark.parametrize(
    "spec",
    ["low-rank-split{rank=4}", "low-rank-split{flops=0.6}", "tensor-train-split{share=0.5}"],
)
def test_an_example_input_that_is_a_view_of_something_larger(spec: str) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))[::2, ::2]
    program = capture(Attention().eval(), (x,), dynamic_shapes="auto")
    after = PassManager(spec).run(program, calibration=[x])
    assert after.cost().parameters < program.cost().parameters


def test_data_that_are_all_the_same_leave_no_direction_to_prefer() -> None:
    x = torch.randn(1, 32).expand(8, 32)
    program = capture(Attention().eval(), (x,), dynamic_shapes="auto")
    for spec in ("low-rank-split{rank=4}", "tensor-train-split{share=0.5}"):
        after = PassManager(spec).run(program, calibration=[x])
        # The biases take up what is lost of the only value that layers give.
        torch.testing.assert_close(after.run(x), program.run(x), rtol=1e-3, atol=1e-3)


def test_patterns_and_what_is_left_alone() -> None:
    program = captured(Attention(), torch.randn(2, 10, 32))
    after = run("low-rank-split{method=svd,rank=4,exclude=[query,value.weight]}", program)
    assert {"query.weight", "value.weight"} <= after.parameters.keys()
    assert {"key.up.weight", "up.up.weight"} <= after.parameters.keys()
    with pytest.raises(Error, match="matches no layer"):
        run("low-rank-split{include=[nothing]}", program)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("low-rank-split{rank=0}", "rank is 0"),
        ("low-rank-split{share=1.5}", "share is 1.5"),
        ("low-rank-split{params=0}", "params is 0"),
        ("low-rank-split{params=0.5,rank=3}", "params and rank all say"),
        ("low-rank-split{method=qr}", "qr"),
        ("low-rank-split{damping=-1}", "damping is -1"),
        ("low-rank-split{method=mixed,rank=3}", "method=mixed chooses"),
        ("low-rank-split{rank=3,allocation=exact}", "the same for every layer"),
    ],
    ids=lambda text: text.removeprefix("low-rank-split"),
)
def test_bad_options_are_refused(spec: str, message: str) -> None:
    with pytest.raises(Error, match=message):
        PassManager(spec)


def test_a_budget_below_what_stays_is_refused() -> None:
    program = captured(Tied(), torch.randint(0, 60, (2, 7)))
    with pytest.raises(Error, match="does not split takes 1,464"):
        run("low-rank-split{params=0.5,embeddings=false}", program)
    with pytest.raises(OptionError):
        LowRankSplit(params="1.5 apples")
    with pytest.raises(Error, match="does not split takes"):
        run("low-rank-split{params=1.5}", program)  # a count, as everywhere


def test_what_is_no_matrix_is_left_with_its_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Linear(12, 12)
            self.deconv = nn.ConvTranspose1d(12, 12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.deconv((self.both(x) * self.both.weight.sum()).mT)

    after = run("low-rank-split{method=svd}", captured(Odd(), torch.randn(2, 5, 12)))
    assert "reads it in another way than as a matrix: both.weight" in messages(after)
    assert "deconv.weight" in messages(after)
    assert not after.history[-1].changed


# -- allocation ------------------------------------------------------------------------------------


def drawn_options(seed: int, count: int = 4) -> list[Option]:
    """Sites with profiles that are not convex, two of which may be decided together."""
    generator = torch.Generator().manual_seed(seed)
    sites = [Site(f"s{i}", "linear", (), (8, 8)) for i in range(count)]
    found = [Option((site,), None, 64.0, 0.0) for site in sites]

    def draw(scale: float) -> float:
        return scale * float(torch.rand((), generator=generator))

    for site in sites:
        found += [Option((site,), None, 60 * (k + 1) / 5, draw(5.0 - k)) for k in range(4)]
    pair = (sites[0], sites[1])
    found += [Option(pair, None, 100 * (k + 1) / 5, draw(8.0 - k)) for k in range(4)]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_the_best_there_is_and_greedy_is_near(seed: int) -> None:
    import itertools

    options = drawn_options(seed)
    sites = [option.sites[0] for option in options[:4]]
    single = [[o for o in options if o.sites == (site,)] for site in sites]
    joint = [o for o in options if len(o.sites) == 2]
    every = [list(c) for c in itertools.product(*single)]
    every += [list(c) for c in itertools.product(joint, *single[2:])]
    for budget in (60.0, 120.0, 200.0):
        best = min(loss_of(c) for c in every if cost_of(c) <= budget)
        exact = choose_exact(thinned(options), budget)
        greedy = choose_greedy(thinned(options), budget)
        for chosen in (exact, greedy):
            assert cost_of(chosen) <= budget
            assert sorted(s.weight for o in chosen for s in o.sites) == [s.weight for s in sites]
        assert loss_of(exact) == pytest.approx(best, rel=1e-6)
        assert loss_of(greedy) >= best - 1e-9
    assert loss_of(choose_greedy(options, 1e9)) == 0
    least = min(cost_of(c) for c in every)
    assert cost_of(choose_exact(thinned(options), 1.0)) == pytest.approx(least)


# -- models that nobody here wrote -----------------------------------------------------------------


def tiny_bert() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return BertModel(config).eval(), {"input_ids": torch.randint(0, 50, (2, 9))}


def tiny_llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 50, (2, 9))}


def tiny_gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, use_cache=False
    )
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 50, (2, 9))}


def tiny_resnet() -> tuple[nn.Module, tuple[torch.Tensor]]:
    from timm.models.resnet import BasicBlock, ResNet

    model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(8, 16, 16, 32))
    return model.eval(), (torch.randn(2, 3, 32, 32),)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "bert": (tiny_bert, 12),
    "llama": (tiny_llama, 15),
    "gpt2": (tiny_gpt2, 9),
    "resnet": (tiny_resnet, 10),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_others(name: str) -> None:
    make, most = MODELS[name]
    model, inputs = make()
    kwargs = inputs if isinstance(inputs, dict) else {}
    args = () if isinstance(inputs, dict) else inputs
    program = capture(model, args, kwargs, dynamic_shapes="auto")
    spec = "low-rank-split{share=0.8,embeddings=true,allocation=uniform}"
    after = run(spec, program)
    assert after.history[-1].statistics["split"] >= most
    joint = run("low-rank-split{method=mixed,share=0.6,weigh=layer,allocation=greedy}", program)
    assert joint.cost().parameters < after.cost().parameters or name == "llama"
    high = run("low-rank-split{share=0.98,allocation=uniform}", program)
    tensors = zip(_flat(high, args, kwargs), _flat(program, args, kwargs), strict=True)
    for found, wanted in tensors:
        assert found.shape == wanted.shape
        assert found.isfinite().all()


def _flat(program: Program, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    outputs = torch.utils._pytree.tree_leaves(program.run(*args, **kwargs))
    return [x for x in outputs if isinstance(x, torch.Tensor)]


@pytest.mark.slow
def test_minilm_at_half_of_its_layers() -> None:
    from torchlathe.tools.demo_minilm import embed, load_encoder, split_sentences

    encoder, tokenizer = load_encoder()
    calibration, test = split_sentences()
    data = [tokenizer(calibration[i : i + 16]) for i in range(0, 64, 16)]
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(encoder, (), dict(data[0]), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test[:48])
    cosines = {}
    for method in ("svd", "whitened-svd"):
        spec = f"low-rank-split{{method={method},allocation=uniform}}"
        after = PassManager(spec, verify="off").run(program, calibration=data)
        cosines[method] = float((before * embed(after.run, tokenizer, test[:48])).sum(1).mean())
    # Measured: 0.35 and 0.79; docs/low_rank.md has the whole curve.
    assert cosines["svd"] < 0.5
    assert cosines["whitened-svd"] > 0.7
