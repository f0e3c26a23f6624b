"""fuse-kernels on what is more than a linear layer: gates, terms, experts, tables, zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.passes.rewrite.lowering.seeing import next_reader, source
from torchlathe.passes.rewrite.lowering.speeds import Speeds
from torchlathe.tools.compat import define_torchvision_ops

define_torchvision_ops()
transformers: Any = pytest.importorskip("transformers")

BRAIN = torch.bfloat16
# Two roundings to bf16 (2**-9 each) in each op of a model of some twenty that were fused apart.
HALF = 0.03
# A sum in fp32 in another order, and int8 products that are exact.
EXACT = 1e-5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of few channels become ops, too: tests of what these compute are quicker so."""
    monkeypatch.setattr("torchlathe.passes.rewrite.lowering.fuse_kernels._LEAST_CHANNELS", 1)


def ops_of(program: Program) -> list[str]:
    names = [str(node.target) for node in program.nodes if node.op == "call_function"]
    return [n.split(".")[1] for n in names if n.startswith("torchlathe.")]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def fused(program: Program, spec: str, device: str = "cuda") -> tuple[Program, Program]:
    """The program after a pipeline, and with kernels."""
    logical = PassManager(spec, verify=False).run(program) if spec else program
    after = PassManager(f"fuse-kernels{{device={device},choose=rule}}", verify=False)
    return logical, after.run(logical)


def first(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def why(program: Program, name: str) -> str:
    told = [d for d in program.history[-1].diagnostics if name in str(d["name"])]
    return str(told[0]["message"])


def small(kind: str, **more: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model nobody here wrote, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4}
    decoder = {"num_key_value_heads": 2, "vocab_size": 64, "use_cache": False}
    ids = torch.randint(0, 64, (2, 8))
    if kind in {"Llama", "Phi3", "Mixtral"}:
        config = getattr(transformers, f"{kind}Config")(
            **sizes, **decoder, pad_token_id=0, eos_token_id=1, bos_token_id=1, **more
        )
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval(), (ids,)
    if kind == "Bert":
        return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64)).eval(), (
            ids,
        )
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8)
    return transformers.ViTModel(config).eval(), (torch.randn(2, 3, 32, 32),)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8", "w4a8"])
def test_llama_on_a_gpu(scheme: str) -> None:
    model, args = small("Llama")
    program = capture(model.to(BRAIN), args)
    logical, after = fused(program, f"quantize{{scheme={scheme},embeddings=true}}")
    names = ops_of(after)
    op = f"{scheme}_linear"
    # Query, key, value, output, gate with up, down, and the head.
    assert names.count(op) == 7
    assert names.count("quantised_embedding") == 1
    assert "dequantize" not in names
    rounded = scheme.endswith("a8")
    # Two of the norms are read by rounding alone; the last is read through a slice of the whole.
    assert names.count("norm_quantise") == (3 if rounded else 0)
    assert "with swiglu of model.layers.0.mlp.up_proj" in why(after, "gate_proj")
    text = after.to_text()
    assert "'swiglu'" in text
    assert "aten.silu" not in text
    # Both residuals went into the layer before them.
    assert after.history[-1].statistics["with_epilogue"] == 3
    with torch.no_grad():
        assert far(first(after.run(*args)), first(logical.run(*args))) < HALF


def test_one_layer_of_both_halves() -> None:
    """Phi-3 stores gate and up as one matrix."""
    model, args = small("Phi3")
    logical, after = fused(capture(model.to(BRAIN), args), "quantize{scheme=w4a16}")
    assert ops_of(after).count("w4a16_linear") == 5
    assert "with swiglu of its halves" in why(after, "gate_up_proj")
    with torch.no_grad():
        assert far(first(after.run(*args)), first(logical.run(*args))) < HALF


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a16,group=32,symmetric=false"])
def test_experts_on_a_gpu(scheme: str) -> None:
    model, args = small("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    logical, after = fused(capture(model.to(BRAIN), args), f"quantize{{scheme={scheme}}}")
    names = ops_of(after)
    op = f"{scheme.split(',')[0]}_experts_linear"
    assert names.count(op) == 2
    assert "dequantize" not in names
    assert "_grouped_mm" not in after.to_text()
    assert "with swiglu" in why(after, "gate_up_proj")
    assert after.cost().flops_at() == logical.cost().flops_at()
    with torch.no_grad():
        assert far(first(after.run(*args)), first(logical.run(*args))) < HALF


def test_experts_on_a_cpu_stay_and_say_so() -> None:
    model, args = small("Mixtral", num_local_experts=4, num_experts_per_tok=2)
    _, after = fused(capture(model.to(BRAIN), args), "quantize{scheme=w4a16}", "cpu")
    told = [d for d in after.history[-1].diagnostics if "experts.down" in str(d["name"])]
    assert told[0]["severity"] == "warning"
    assert "slower than dense" in str(told[0]["message"])


@pytest.mark.usefixtures("_few_channels")
@pytest.mark.parametrize("kind", ["Bert", "ViT"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_encoders(kind: str, device: str) -> None:
    """Dropout that is off stands between a layer and its residual."""
    model, args = small(kind)
    logical, after = fused(capture(model, args), "quantize", device)
    names = ops_of(after)
    assert names.count("w8a8_linear") == 7
    assert names.count("w8a8_conv2d") == (1 if kind == "ViT" else 0)
    assert "dequantize" not in names
    # Two residuals and a GELU.
    assert after.history[-1].statistics["with_epilogue"] == 3
    # Those of BERT are read by the residual as well.
    assert names.count("norm_quantise") == (2 if kind == "ViT" and device == "cuda" else 0)
    assert after.cost().flops_at() == logical.cost().flops_at()
    with torch.no_grad():
        # A number at the middle between two may be rounded to either, and moves what follows.
        assert far(first(after.run(*args)), first(logical.run(*args))) < 0.01


class Gates(nn.Module):
    """Gates of all kinds, with biases and a residual behind."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(128, features), nn.Linear(128, features)
        self.back = nn.Linear(features, 128, bias=False)

    def forward(self, x: torch.Tensor, how: str) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x)
        if how == "geglu":
            y = F.gelu(gate) * up
        elif how == "geglu_tanh":
            y = up * F.gelu(gate, approximate="tanh")
        elif how == "reglu":
            y = F.relu(gate) * up
        else:
            y = gate * up
        return x + self.back(y)


@pytest.mark.parametrize("how", ["geglu", "geglu_tanh", "reglu", "bilinear"])
def test_gates(how: str) -> None:
    torch.manual_seed(0)
    model = Gates(200).eval()  # rows that are no whole tiles

    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, how)  # type: ignore[no-any-return]

    x = torch.randn(3, 5, 128)
    logical, after = fused(capture(Bound(), (x,)), "quantize")
    assert ops_of(after).count("w8a8_linear") == 2
    assert f"'{how}'" in after.to_text()
    with torch.no_grad():
        assert far(after.run(x), logical.run(x)) < 1e-3  # the fp32 sums in other orders


def test_gates_that_no_op_takes_are_both_told_of() -> None:
    model, args = small("Llama")
    logical = PassManager("quantize{scheme=w4a16}", verify=False).run(capture(model, args))
    for fallback, left in (("stored", 8), ("dense", 0)):
        spec = f"fuse-kernels{{device=cuda,fallback={fallback}}}"
        after = PassManager(spec, verify=False).run(logical)
        assert ops_of(after).count("dequantize") == left
        assert "its inputs are float32" in why(after, "gate_proj")
        assert "its inputs are float32" in why(after, "up_proj")


def test_a_gate_that_others_read_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(128, 64), nn.Linear(128, 64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate = F.silu(self.gate(x))
            return gate * self.up(x), gate

    x = torch.randn(3, 128)
    logical, after = fused(capture(Shared().eval(), (x,)), "quantize")
    assert ops_of(after).count("w8a8_linear") == 2
    assert "swiglu" not in after.to_text()
    with torch.no_grad():
        for found, wanted in zip(after.run(x), logical.run(x), strict=True):
            assert far(found, wanted) < EXACT


@pytest.mark.parametrize(("residual", "op"), [("w4a16", "w4a16"), ("w8a16", "w8a16")])
def test_a_low_rank_term_goes_into_the_kernel(residual: str, op: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 128)).eval().to(BRAIN)
    x = torch.randn(4, 8, 256).to(BRAIN)
    spec = f"low-rank-split{{rank=12,residual={residual}}}"
    logical, after = fused(capture(model, (x,)), spec)
    assert ops_of(after) == [f"{op}_low_rank_linear"] * 2
    assert "with a term of rank 12" in why(after, "0.weight")
    assert after.history[-1].statistics["with_epilogue"] == 2
    with torch.no_grad():
        assert far(after.run(x), logical.run(x)) < HALF
    # On a CPU the term is a residual, which the layer's op adds.
    _, on_cpu = fused(capture(model, (x,)), spec, "cpu")
    assert ops_of(on_cpu) == [f"{op}_cpu_linear"] * 2


def test_thin_layers_become_one_op_for_few_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 128)).eval().to(BRAIN)
    x = torch.randn(4, 8, 256).to(BRAIN)
    logical, after = fused(capture(model, (x,)), "low-rank-split{rank=16}")
    assert ops_of(after) == ["low_rank_linear"] * 2
    with torch.no_grad():
        assert far(after.run(x), logical.run(x)) < HALF
    many = torch.randn(200, 256).to(BRAIN)
    _, after = fused(capture(model, (many,)), "low-rank-split{rank=16}")
    assert ops_of(after) == []
    assert "for 200 tokens two products by the library are faster" in why(after, "0.up")


def test_blocks_of_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 320)).eval()
    x = torch.randn(4, 512)
    spec = "sparsify-nm{pattern=block,block=64,sparsity=0.8,method=magnitude}"
    logical, after = fused(capture(model.to(BRAIN), (x.to(BRAIN),)), spec)
    assert ops_of(after) == ["block_sparse_linear"] * 2
    with torch.no_grad():
        assert far(after.run(x.to(BRAIN)), logical.run(x.to(BRAIN))) < HALF
    logical, on_cpu = fused(capture(model.float(), (x,)), spec, "cpu")
    assert ops_of(on_cpu) == ["block_sparse_linear"] * 2
    with torch.no_grad():
        assert far(on_cpu.run(x), logical.run(x)) < EXACT
    dense = spec.replace("0.8", "0.3")
    _, after = fused(capture(model, (x,)), dense, "cpu")
    assert ops_of(after) == []
    assert "are not zero, and up to 25% pay" in why(after, "0.weight")


def test_blocks_are_timed_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Linear(512, 512).eval()
    x = torch.randn(4, 512)
    sparse = PassManager("sparsify-nm{pattern=block,block=64,sparsity=0.8,method=magnitude}").run(
        capture(model, (x,))
    )
    for ours, count in ((0.5, 1), (2.0, 0)):
        seconds = {"dense": 1.0, "block_sparse_linear": ours}
        monkeypatch.setattr(
            Speeds, "of", lambda self, site, names, s=seconds: {n: s[n] for n in names}
        )
        after = PassManager("fuse-kernels").run(sparse)
        assert ops_of(after).count("block_sparse_linear") == count


def test_two_zeros_in_four_stay_dense_and_say_why() -> None:
    torch.manual_seed(0)
    model = nn.Linear(128, 64).eval().to(BRAIN)
    x = torch.randn(4, 128).to(BRAIN)
    for device, reason in (("cpu", "no such product on a CPU"), ("cuda", "no measurement says")):
        _, after = fused(capture(model, (x,)), "sparsify-nm{method=magnitude}", device)
        assert ops_of(after) == []
        assert reason in why(after, "weight")


def test_dense_weights_are_left_alone() -> None:
    x = torch.randn(4, 128)
    _, after = fused(capture(nn.Linear(128, 64).eval(), (x,)), "")
    assert after.history[-1].statistics["layers"] == 0


@pytest.mark.usefixtures("_few_channels")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(16, 24, 1),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.Conv2d(16, 24, (3, 5), padding=(0, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(16, 24, 8, stride=8),
    ],
    ids=["one", "strided", "dilated", "patches"],
)
def test_convolutions(conv: nn.Conv2d) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(8)).eval()
    x = torch.randn(3, 16, 16, 24)
    model(x)
    program = capture(model, (x,), dynamic_shapes="auto")
    # A second rounding would make much of the last bits of the first.
    logical, after = fused(program, "quantize{exclude=[3.weight]}", "cpu")
    assert ops_of(after).count("w8a8_conv2d") == 1
    assert after.cost().flops_at() == program.cost().flops_at()
    with torch.no_grad():
        for batch in (x, torch.randn(5, 16, 16, 24)):
            assert far(after.run(batch), logical.run(batch)) < EXACT


def test_convolutions_that_no_op_takes_say_why() -> None:
    x = torch.randn(1, 32, 8, 8)
    for model, spec, reason in (
        (nn.Conv2d(32, 32, 3, groups=4), "quantize", "it has 4 groups"),
        (nn.Conv2d(32, 32, 3), "quantize{scheme=w8a16}", "its inputs floating"),
    ):
        _, after = fused(capture(model.eval(), (x,)), spec, "cpu")
        assert reason in why(after, "weight")


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16,group=32", "w2a16", "nvfp4"])
def test_a_table_stays_packed(scheme: str) -> None:
    torch.manual_seed(0)
    model = nn.Embedding(50, 96).eval()
    ids = torch.randint(0, 50, (3, 4))
    spec = f"quantize{{scheme={scheme},embeddings=true}}"
    logical, after = fused(capture(model, (ids,)), spec, "cpu")
    assert ops_of(after) == ["quantised_embedding"]
    assert torch.equal(after.run(ids), logical.run(ids))
    # Nothing that the op reads has as many numbers as the table.
    largest = max(entry.tensor.element_size() for entry in after.entries.values())
    assert after.cost().bytes == logical.cost().bytes
    assert largest <= 4


def test_whole_rows_of_four_bits_on_a_cpu() -> None:
    """One scale a row is cut in the groups that torch's kernel takes."""
    torch.manual_seed(0)
    model = nn.Linear(96, 40).eval().to(BRAIN)
    x = torch.randn(3, 96).to(BRAIN)
    logical, after = fused(capture(model, (x,)), "quantize{scheme=w4a16,group=0}", "cpu")
    assert ops_of(after) == ["w4a16_cpu_linear"]
    with torch.no_grad():
        assert far(after.run(x), logical.run(x)) < HALF


def test_columns_that_torch_cannot_take_stay_stored() -> None:
    model = nn.Linear(200, 40).eval().to(BRAIN)
    x = torch.randn(3, 200).to(BRAIN)
    _, after = fused(capture(model, (x,)), "quantize{scheme=w8a16}", "cpu")
    assert ops_of(after) == ["dequantize"]
    assert "200 columns: torch's kernel takes multiples of 16" in why(after, "weight")


def test_seeing_through_what_changes_nothing() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.dropout(x.relu(), 0.5, training=False).to(torch.float32)[:, :]
            return y[:2].neg()

    program = capture(Model().eval(), (torch.randn(4, 3),))
    nodes = {str(node.target): node for node in program.nodes if node.op == "call_function"}
    relu, neg = nodes["aten.relu.default"], nodes["aten.neg.default"]
    half = neg.args[0]
    assert isinstance(half, torch.fx.Node)
    assert source(half) is half  # a part is not the whole
    found = next_reader(relu)
    assert found is not None
    assert found[1] is half
    assert source(found[0]) is relu


@pytest.mark.usefixtures("_few_channels")
def test_a_bias_that_is_computed_stays_with_its_convolution() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gain = nn.Conv2d(16, 32, 3), nn.Parameter(torch.rand(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.conv.bias
            assert bias is not None
            return nn.functional.conv2d(x, self.conv.weight, bias * self.gain + 5)

    torch.manual_seed(0)
    model, x = Scaled().eval(), torch.randn(2, 16, 9, 9)
    spec = "quantize,fuse-kernels{choose=rule,device=cpu}"
    fused = PassManager(spec).run(capture(model, (x,)))
    assert "torchlathe.w8a8_conv2d.default" in [str(node.target) for node in fused.nodes]
    assert (fused.run(x) - model(x)).abs().max() < 0.1  # of values around 5, in 8 bits


def test_two_layers_do_not_take_in_the_same_sum() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x) + self.b(x.relu())
            return self.c(h) + h.tanh()

    torch.manual_seed(0)
    model, x = Sum().eval(), torch.randn(8, 64)
    spec = "quantize,fuse-kernels{choose=rule,device=cpu}"
    fused = PassManager(spec).run(capture(model, (x,)))
    targets = [str(node.target) for node in fused.nodes]
    assert targets.count("torchlathe.w8a8_linear.default") == 3
    assert "aten.linear.default" not in targets
    assert (fused.run(x) - model(x)).norm() < 0.02 * model(x).norm()
