"""tensor-train-split and kronecker-split on programs: what they write, and that it stays right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from torchlathe import PassManager, capture
from torchlathe.ir import OptionError, PassError, Program
from torchlathe.ir.verifying import verify
from torchlathe.passes import KroneckerSplit, TensorTrainSplit, ZeroInvariantGroups
from torchlathe.passes.rewrite.factorising.sites import find_sites
from torchlathe.passes.rewrite.tensor_networks.plans import network_cores, network_plan
from torchlathe.passes.rewrite.tensor_networks.trains import dense
from torchlathe.passes.rewrite.tensor_networks.writing import LayerClock, rows_of, write_network
from torchlathe.tools.compat import define_torchvision_ops

# Sums of some hundred products in float32, of numbers around one.
SINGLE = 2e-5


class Attention(nn.Module):
    """Heads, three layers that read the same input, and a feed-forward part."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.down(torch.relu(self.up(x)))


class Pointwise(nn.Module):
    """Convolutions with a kernel of one, some that stride or pad, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.plain = nn.Conv2d(16, 24, 1)
        self.strided = nn.Conv2d(24, 16, 1, stride=(1, 2), padding=1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=2)
        self.line = nn.Conv1d(16, 12, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.plain(torch.relu(self.first(x))))
        return self.line(torch.relu(self.grouped(self.strided(x))).flatten(2))


class Tied(nn.Module):
    """One matrix read twice, and once as an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.mix = nn.Linear(24, 24)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.tanh(self.mix(self.embed(ids))))


class Prime(nn.Module):
    """Extents without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(31, 37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def program_of(model: nn.Module, *inputs: torch.Tensor) -> Program:
    torch.manual_seed(0)
    sizes = {axis: torch.export.Dim(name, max=64) for axis, name in ((0, "b"), (1, "s"))}
    shapes: Any = (sizes,) if inputs[0].dim() == 3 else "auto"
    return capture(model.eval(), inputs, dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def attention() -> Program:
    torch.manual_seed(0)
    return program_of(Attention(), torch.randn(2, 10, 32))


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(10, 32, generator=generator)
    return [torch.randn(8, 10, 10, generator=generator) @ mix for _ in range(count)]


def run(spec: str, program: Program, **data: Any) -> Program:
    after = PassManager(spec).run(program, **data)
    verify(after, "full")
    return after


def difference(after: Program, before: Program, *inputs: torch.Tensor) -> float:
    with torch.no_grad():
        wanted = before.run(*inputs)
        return float((after.run(*inputs) - wanted).norm() / wanted.norm())


def messages(program: Program) -> str:
    return "\n".join(f"{d['name']}: {d['message']}" for d in program.history[-1].diagnostics)


WAYS = [
    "tensor-train-split{time=false}",
    "tensor-train-split{method=svd,sites=3,weigh=layer,time=false}",
    "tensor-train-split{bytes=0.6,allocation=greedy,weigh=layer,sweeps=1,time=false}",
    "tensor-train-split{rank=6,time=false,lowering=contract}",
    "kronecker-split{share=0.4,allocation=uniform,time=false}",
    "kronecker-split{params=0.6,skew=4,sweeps=1,weigh=layer,time=false}",
    "kronecker-split{flops=0.7,method=svd,weigh=layer,time=false}",
]


@pytest.mark.parametrize("spec", WAYS)
def test_every_way_keeps_within_its_budget_and_near_the_outputs(
    spec: str, attention: Program
) -> None:
    before = attention.cost()
    after = run(spec, attention, calibration=batches())
    record, cost = after.history[-1], after.cost()
    assert record.changed
    assert cost.parameters < before.parameters
    share = 0.4 if "share" in spec else 0.5
    if not any(name in spec for name in ("rank", "bytes", "params", "flops")):
        assert record.statistics["kept_of_layers"] <= share * 7168
    if "params" in spec:
        assert cost.parameters <= 0.6 * before.parameters
    if "bytes" in spec:
        assert cost.bytes <= 0.6 * before.bytes
    if "flops" in spec:
        assert cost.flops_at() <= 0.7 * before.flops_at()
    # Random weights have no structure to find; the residual carries most of the output.
    assert difference(after, attention, batches()[0][:3, :7]) < 0.4


def test_data_with_few_directions_is_kept_by_the_whitened_network(attention: Program) -> None:
    """Ten of 32 directions occur: fitting to the outputs finds these, and plain cuts do not."""
    found = {}
    for method in ("svd", "whitened"):
        spec = f"tensor-train-split{{share=0.5,allocation=uniform,method={method},time=false}}"
        after = run(spec, attention, calibration=batches())
        found[method] = difference(after, attention, batches()[0])
    assert found["whitened"] < 0.6 * found["svd"]


@pytest.mark.parametrize("lowering", ["contract", "materialise"])
@pytest.mark.parametrize("kind", ["tensor-train", "kronecker"])
def test_what_is_written_is_the_dense_product(kind: Any, lowering: Any) -> None:
    program = program_of(Attention(), torch.randn(2, 10, 32))
    copy = program.copy()
    with copy.edit(by="test") as edit:
        for site in find_sites(copy)[0]:
            matrix = site.matrices(copy.tensor(site.weight).detach())[0]
            modes = {"tensor-train": (4, site.outs // 4), "kronecker": (site.outs // 2, 2)}[kind]
            ins = (4, site.ins // 4) if kind == "tensor-train" else (2, site.ins // 2)
            plan = network_plan(kind, modes, ins, 5)
            assert plan is not None
            cores = network_cores(plan, matrix, None)
            program.tensor(site.weight).data.copy_(dense(cores))
            (done,) = write_network(edit, site, plan, cores, lowering=lowering)
            assert done.builds == (lowering == "materialise")
    verify(copy, "full")
    x = torch.randn(3, 7, 32)
    assert difference(copy, program, x) < SINGLE


def test_the_error_that_is_told_is_that_of_the_layer() -> None:
    program = program_of(nn.Linear(24, 36), torch.randn(4, 24))
    data = [torch.randn(64, 24) * torch.rand(24) + 1 for _ in range(2)]
    after = run("tensor-train-split{rank=4,time=false}", program, calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        wanted, got = program.run(x), after.run(x)
    lost = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    told = after.history[-1].statistics["mean_error"]
    # The bias takes up the mean, so that what is left is relative to the variance.
    assert float(lost) == pytest.approx(told, rel=1e-3)
    assert float((got - wanted).mean(0).abs().max()) < 1e-5


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_an_error_of_each_layer(method: str) -> None:
    """Layers that are sums of three products get small; one that is not is left alone."""
    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        for layer in (model.query, model.key, model.value, model.up):
            outs, ins = layer.weight.shape
            terms = [torch.randn(outs // 8, 4), torch.randn(8, ins // 4)]
            layer.weight.copy_(torch.kron(*terms) / 30 + torch.randn(outs, ins) * 1e-4)
    program = program_of(model, torch.randn(2, 10, 32))
    spec = f"tensor-train-split{{error=0.05,method={method},time=false}}"
    after = run(spec, program, calibration=[torch.randn(64, 10, 32)])
    assert after.history[-1].statistics["largest_error"] <= 0.05**2
    assert after.history[-1].statistics["split"] == 4
    assert after.cost().parameters < 0.45 * program.cost().parameters
    assert "down.weight: left alone, since no network" in messages(after)


def test_what_cannot_be_split_is_named() -> None:
    program = program_of(Prime(), torch.randn(4, 31))
    for spec in ("tensor-train-split{method=svd}", "kronecker-split{method=svd}"):
        after = PassManager(spec).run(program)
        assert not after.history[-1].changed
        assert "its extents have too few factors: layer.weight" in messages(after)


def test_convolutions() -> None:
    program = program_of(Pointwise(), torch.randn(2, 8, 6, 6))
    x = torch.randn(3, 8, 6, 6)
    for lowering in ("contract", "materialise"):
        spec = f"tensor-train-split{{rank=5,method=svd,lowering={lowering},time=false}}"
        after = run(spec, program)
        names = set(after.parameters)
        assert {"plain.core1.weight", "strided.core2.weight", "line.core1.weight"} <= names
        text = messages(after)
        assert "its kernel is larger than 1: first.weight" in text
        assert "it is a grouped convolution: grouped.weight" in text
        # What strides or pads is built however it was asked.
        assert "strided.weight: bond 5 between 4x4 * 4x6: " in text
        assert after.history[-1].statistics["built_in_each_run"] == (
            1 if lowering == "contract" else 3
        )
        assert difference(after, program, x) < 1
    exact = run("kronecker-split{rank=40,method=svd,time=false}", program)
    assert not exact.history[-1].changed
    assert "its cores would not be smaller" in messages(exact)


def test_a_matrix_that_is_read_twice_stays_one() -> None:
    program = program_of(Tied(), torch.randint(0, 60, (3, 5)))
    after = run("tensor-train-split{rank=3,method=svd,time=false}", program)
    assert {n for n in after.parameters if "core" in n} == {"mix.core1.weight", "mix.core2.weight"}
    assert after.cost().parameters < program.cost().parameters
    assert "it is an embedding: embed.weight" in messages(after)
    assert difference(after, program, torch.randint(0, 60, (2, 5))) < 1


def test_few_rows_are_contracted_and_many_get_the_matrix() -> None:
    program = program_of(nn.Linear(256, 256), torch.randn(2, 256))
    few = run("tensor-train-split{rank=8,method=svd,rows=1,time=false}", program)
    many = run("tensor-train-split{rank=8,method=svd,rows=100000,time=false}", program)
    assert "is contracted for 1 rows" in messages(few)
    assert "builds its matrix for 100,000 rows" in messages(many)
    x = torch.randn(5, 256)
    assert difference(few, many, x) < SINGLE
    (site,) = find_sites(program)[0]
    assert rows_of(program, site, site.calls[0]) == 2


def test_the_clock_decides_where_it_is_asked() -> None:
    """With a clock that finds building slow, contracting wins at any number of rows."""
    ticks = iter(range(10**9))

    def timer(work: Callable[[], object]) -> float:
        work()
        return [1.0, 5.0, 0.5][next(ticks) % 3]

    program = program_of(nn.Linear(64, 64), torch.randn(2, 64))
    with program.edit(by="test") as edit:
        (site,) = find_sites(program)[0]
        plan = network_plan("tensor-train", (8, 8), (8, 8), 4)
        assert plan is not None
        cores = network_cores(plan, program.tensor(site.weight).detach(), None)
        clock = LayerClock(timer)
        (done,) = write_network(edit, site, plan, cores, rows=10**6 // 8, clock=clock)
    assert done.measured == (1.0, 5.0, 0.5)
    assert not done.builds


def test_slow_layers_are_named() -> None:
    """Nine times the FLOPs of the dense layer: no machine is that fast."""
    program = program_of(nn.Linear(384, 384), torch.randn(64, 384))
    spec = "tensor-train-split{share=0.5,method=svd,allocation=uniform,lowering=contract}"
    after = run(spec, program)
    assert "does not pay in time" in messages(after)


def test_families_and_erasing_after_it(attention: Program) -> None:
    """Heads stay heads, bonds are free, and erased programs are right."""
    spec = "tensor-train-split{rank=6,method=svd,lowering=contract,time=false}"
    after = run(spec, attention)
    families = after.analysis(ZeroInvariantGroups)
    bonds = families.by_name("query.core2.weight:0")
    assert (bonds.extent, str(bonds.exactness)) == (6, "exact")
    heads = {("query.core1.weight", 0), ("key.core1.weight", 0), ("value.core1.weight", 0)}
    shared = [f for f in families if heads <= {(s.name, s.axis) for s in f.slices}]
    assert [f.extent for f in shared] == [4]
    pinned = [str(family) for family in families if "pinned" in str(family)]
    assert any("it is an axis of the input" in text for text in pinned)
    smaller = run("structured-erase{sparsity=0.4}", after)
    assert smaller.cost().parameters < after.cost().parameters
    x = torch.randn(2, 5, 32)
    assert torch.isfinite(smaller.run(x)).all()
    # Erasing half of the bonds is the split to half of them: singular values come first.
    erase = "structured-erase{sparsity=0.5,include=[query.core2.weight:0]}"
    assert run(erase, after).tensor("query.core2.weight").shape[0] == 3


def test_the_same_twice_and_text_of_the_pass(attention: Program) -> None:
    chosen = TensorTrainSplit(rank=4, sites=3, method="svd", time=False)
    assert str(chosen) == "tensor-train-split{rank=4,time=false,method=svd,sites=3}"
    once, again = (PassManager([chosen]).run(attention) for _ in range(2))
    for name, tensor in once.parameters.items():
        torch.testing.assert_close(again.parameters[name], tensor)
    # Cores have other than two axes, so that nothing is left to split.
    third = PassManager([chosen]).run(once)
    assert not third.history[-1].changed


BAD = [
    ({"rank": 2, "share": 0.5}, "share and rank all say how much"),
    ({"error": 0.1, "share": 0.5}, "error and share both say how much"),
    ({"error": 1.5}, "error is 1.5"),
    ({"bond": 0}, "bond is 0"),
    ({"sweeps": -1}, "sweeps is -1"),
    ({"rows": 0}, "rows is 0"),
    ({"damping": 2.0}, "damping is 2.0"),
    ({"rank": 3, "allocation": "exact"}, "says the same for every layer"),
    ({"latency": 0.5}, "latency is no budget"),
    ({"lowering": "fuse"}, "lowering"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    for split in (TensorTrainSplit, KroneckerSplit):
        with pytest.raises(OptionError, match=message):
            split(**options)


def test_bad_options_of_one_pass() -> None:
    with pytest.raises(OptionError, match="sites is 6"):
        TensorTrainSplit(sites=6)
    with pytest.raises(OptionError, match="skew is 1"):
        KroneckerSplit(skew=1)
    program = program_of(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(PassError, match="matches no layer"):
        PassManager("kronecker-split{include=[nothing*]}").run(program)


def test_without_data_the_example_inputs_stand_for_it(attention: Program) -> None:
    after = run("kronecker-split{rank=4,time=false}", attention)
    assert any("example inputs" in d["message"] for d in after.history[-1].diagnostics)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_models_of_transformers(name: str) -> None:
    """Padding masks, Conv1D with its transposed weight, and queries, keys and values in one."""
    define_torchvision_ops()
    import transformers

    small = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 4}
    if name == "bert":
        config = transformers.BertConfig(
            **small, hidden_size=32, intermediate_size=48, max_position_embeddings=64
        )
        model: nn.Module = transformers.BertModel(config)
    else:
        model = transformers.GPT2Model(
            transformers.GPT2Config(
                **small, n_embd=32, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
            )
        )
    ids = torch.randint(0, 60, (2, 7))
    sizes = {0: torch.export.Dim("b", max=64), 1: torch.export.Dim("s", max=64)}
    program = capture(model.eval(), (), {"input_ids": ids}, dynamic_shapes={"input_ids": sizes})
    data = [{"input_ids": torch.randint(0, 60, (4, 9))} for _ in range(2)]
    specs = ("tensor-train-split{rank=5,time=false}", "kronecker-split{rank=6,time=false}")
    for spec in specs:
        after = run(spec, program, calibration=data)
        assert after.history[-1].statistics["split"] >= 3
        other = torch.randint(0, 60, (3, 11))
        with torch.no_grad():
            wanted = program.run(input_ids=other).last_hidden_state
            got = after.run(input_ids=other).last_hidden_state
        assert float((got - wanted).norm() / wanted.norm()) < 0.5
    erased = run("structured-erase{sparsity=0.3}", after)
    assert erased.cost().parameters < after.cost().parameters


@pytest.mark.slow
@pytest.mark.parametrize("lowering", ["contract", "materialise"])
@pytest.mark.parametrize("backend", ["inductor", "aoti", "onnx"])
def test_backends_take_it(backend: str, lowering: str) -> None:
    if backend == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 10, 32)
    sizes = {axis: torch.export.Dim(name, max=64) for axis, name in ((0, "b"), (1, "s"))}
    spec = f"tensor-train-split{{rank=6,method=svd,lowering={lowering},time=false}}"
    compiled = tl.compile(
        model, spec, (x,), dynamic_shapes=(sizes,), backend=backend, measure_latency=False
    )
    with torch.no_grad():
        for shape in ((2, 10, 32), (3, 7, 32)):
            inputs = torch.randn(shape)
            wanted = compiled.program.run(inputs)
            torch.testing.assert_close(compiled(inputs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 32)
    compiled = tl.compile(
        Attention().eval(), "kronecker-split{rank=4,method=svd}", (x,), measure_latency=False
    )
    compiled.save(tmp_path / "model.tl")
    again = tl.load(tmp_path / "model.tl")
    torch.testing.assert_close(again(x), compiled(x))


def test_factors_of_an_earlier_split_can_be_split() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    x = torch.randn(32, 64)
    small = tl.compile(
        model,
        "low-rank-split{rank=32,method=svd},tensor-train-split{share=0.7,method=svd}",
        (x,),
        measure_latency=False,
    )
    # Two factors in a row, both cut: the second is written when the first is new.
    first, second = (record.statistics for record in small.program.history[:2])
    assert first["split"] == 2
    assert small(x).shape == (32, 64)
    assert second["split"] >= 2
