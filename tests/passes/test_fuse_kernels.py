"""fuse-kernels: which op stands for which layer, and that the function stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlathe as tl
from torchlathe import PassManager, capture
from torchlathe.ir import Error, Program
from torchlathe.passes.rewrite.lowering.layers import Layer, logical_layers
from torchlathe.passes.rewrite.lowering.speeds import Speeds, about


class Block(nn.Module):
    """Layers with a bias, an activation or a residual behind them, and a norm before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.left, self.right = nn.Linear(128, 128), nn.Linear(128, 128, bias=False)
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)
        self.last = nn.Linear(128, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.left(y) * self.right(y)
        x = x + self.down(F.gelu(self.up(x)))
        return self.last(x)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHLATHE_CACHE", str(tmp_path / "cache"))


def block(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Program, torch.Tensor]:
    torch.manual_seed(0)
    model = Block().eval().to(dtype)
    x = torch.randn(3, 5, 128, dtype=dtype)
    return model, capture(model, (x,), dynamic_shapes="auto"), x


def ops_of(program: Program) -> list[str]:
    names = [str(node.target) for node in program.nodes if node.op == "call_function"]
    return [n.split(".")[1] for n in names if n.startswith("torchlathe.")]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


# Of fp32, products of int8 are exact, and the rest is the order of sums. In bf16 the fused op
# rounds once where the layers round after each op: a few of its 2**-8.
EXACT, HALF = 2e-6, 0.02
# A norm that rounds to fp8 itself does not round to bf16 first: some numbers are the next of fp8's,
# an eighth away.
FP8 = 0.05

CASES = [
    ("w8a8", torch.float32, "cpu", "w8a8_linear"),
    ("w8a8", torch.bfloat16, "cpu", "w8a8_linear"),
    ("w8a16", torch.bfloat16, "cpu", "w8a16_cpu_linear"),
    ("w4a16,group=32", torch.bfloat16, "cpu", "w4a16_cpu_linear"),
    ("w4a16,group=64,symmetric=false", torch.bfloat16, "cpu", "w4a16_cpu_linear"),
    ("w4a8,group=0", torch.float32, "cpu", "w4a8_linear"),
    ("w8a8", torch.float32, "cuda", "w8a8_linear"),
    ("fp8", torch.bfloat16, "cuda", "w8a8_linear"),
    ("w8a16", torch.bfloat16, "cuda", "w8a16_linear"),
    ("w4a16", torch.bfloat16, "cuda", "w4a16_linear"),
    ("w4a16,group=32,symmetric=false", torch.float16, "cuda", "w4a16_linear"),
    ("w4a8", torch.bfloat16, "cuda", "w4a8_linear"),
]


@pytest.mark.parametrize(
    ("scheme", "dtype", "device", "op"),
    CASES,
    ids=[f"{s}-{str(t).removeprefix('torch.')}-{d}" for s, t, d, _ in CASES],
)
def test_one_op_stands_for_each_layer(
    scheme: str, dtype: torch.dtype, device: str, op: str
) -> None:
    _, program, x = block(dtype)
    logical = PassManager(f"quantize{{scheme={scheme}}}", verify=False).run(program)
    fused = PassManager(f"fuse-kernels{{device={device},choose=rule}}", verify="full").run(logical)
    names = ops_of(fused)
    # On a GPU left and right are one op, which adds the residual too.
    assert names.count(op) == (4 if device == "cuda" else 5)
    assert "dequantize" not in names
    assert fused.history[-1].statistics["with_epilogue"] == (3 if device == "cuda" else 2)
    with torch.no_grad():
        wanted, found = logical.run(x), fused.run(x)
    half = FP8 if scheme == "fp8" else HALF
    assert far(found, wanted) < (EXACT if dtype == torch.float32 else half)
    # FLOPs are those of the layers, whatever op computes them.
    assert fused.cost().flops_at() == program.cost().flops_at()


def test_numbers_of_an_input_are_made_once() -> None:
    _, program, _ = block()
    fused = PassManager("quantize,fuse-kernels{choose=rule}").run(program)
    # Left and right read one value.
    assert ops_of(fused).count("quantize_tokens") == 4


def test_a_norm_takes_the_rounding_on_a_gpu() -> None:
    _, program, x = block()
    logical = PassManager("quantize").run(program)
    fused = PassManager("fuse-kernels{device=cuda}").run(logical)
    assert ops_of(fused).count("norm_quantise") == 1
    with torch.no_grad():
        # A value at the middle between two numbers may be rounded to either: one step of 127 of
        # the largest, in a few of the inputs.
        assert far(fused.run(x), logical.run(x)) < 5e-3


def test_eager_measures_and_says_what_is_slower() -> None:
    _, program, _ = block()
    logical = PassManager("quantize{scheme=fp8}").run(program)
    fused = PassManager("fuse-kernels").run(logical)
    record = fused.history[-1]
    assert record.statistics["stored"] == 5
    told = [d for d in record.diagnostics if d["name"] == "up.weight"]
    assert "times as fast as dense at 15 x 128 x 256" in str(told[0]["message"])
    assert "its numbers are fp8" in str(told[0]["message"])
    dense = PassManager("fuse-kernels{fallback=dense,choose=rule}").run(logical)
    assert dense.history[-1].statistics["dense"] == 5
    assert ops_of(dense).count("dequantize") == 0


@pytest.mark.parametrize("extent", [1, 40, 256, 257, 264, 300, 768, 2151, 3072, 11008])
def test_a_size_that_stands_for_those_near_to_it(extent: int) -> None:
    stands = about(extent)
    assert abs(stands - extent) <= extent / 16 + 8
    assert stands == extent or extent > 256
    # what ops need to be divided stays as it is, and so does what is not
    for divisor in (16, 8, 4):
        assert (stands % divisor == 0) == (extent % divisor == 0)


def test_speeds_are_kept(tmp_path: Path) -> None:
    _, program, _ = block()
    layer = logical_layers(PassManager("quantize").run(program))[0]
    ticks = iter(range(10**6))
    speeds = Speeds(tmp_path, clock=lambda: float(next(ticks)))
    found = speeds.of(layer, ["dense", "stored", "w8a8_linear"])
    assert speeds.measured == 1
    speeds.save()
    again = Speeds(tmp_path)
    assert again.of(layer, ["dense", "stored", "w8a8_linear"]) == found
    assert again.measured == 0
    again.path.write_text("not json")
    assert Speeds(tmp_path).entries == {}


def test_weights_packed_for_another_processor_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, x = block(torch.bfloat16)
    spec = "quantize{scheme=w4a16,group=32},fuse-kernels{choose=rule}"
    fused = PassManager(spec, verify=False).run(program)
    monkeypatch.setattr("torchlathe.kernels.w4a16.cpu.capability", lambda: "SVE256")
    with pytest.raises(Error, match="this processor has SVE256"):
        fused.run(x)


def test_convolutions_are_timed_and_tables_stay_packed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 64), nn.Linear(64, 64)).eval()
    ids = torch.randint(0, 30, (4, 6))
    program = capture(model, (ids,))
    fused = PassManager("quantize{embeddings=true},fuse-kernels{choose=rule}").run(program)
    assert ops_of(fused) == ["quantised_embedding", "quantize_tokens", "w8a8_linear"]
    conv = capture(nn.Conv2d(16, 32, 3), (torch.randn(1, 16, 8, 8),))
    told = PassManager("quantize,fuse-kernels").run(conv).history[-1].diagnostics
    assert "times as fast as dense at 1 x 16 x 8 x 8" in str(told[0]["message"])


def test_compile_fuses_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_wins(self: Speeds, layer: Layer, names: list[str]) -> dict[str, float]:
        return {name: 1.0 if name == "w8a8_linear" else 2.0 for name in names}

    # what is fastest is the machine's to say, and not this test's
    monkeypatch.setattr(Speeds, "of", fused_wins)
    model, _, x = block()
    compiled = tl.compile(model, "quantize", (x,), dynamic_shapes="auto", measure_latency=False)
    assert [record.spec for record in compiled.program.history] == ["quantize", "fuse-kernels"]
    assert "w8a8_linear" in ops_of(compiled.program)
    with torch.no_grad():
        assert far(compiled(x), model(x)) < 0.02
        found = compiled(torch.randn(7, 5, 128))
    assert found.shape == (7, 5, 40)
    compiled.save(tmp_path / "model.tl")
    with torch.no_grad():
        assert torch.equal(tl.load(tmp_path / "model.tl")(x), compiled(x))
    own = tl.compile(
        model, "quantize,fuse-kernels{choose=rule}", (x,), measure_latency=False
    )  # fmt: skip
    assert len(own.program.history) == 2


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16,group=32", "w8a16"])
def test_inductor_runs_the_fused_ops(scheme: str) -> None:
    model, _, x = block(torch.bfloat16)
    compiled = tl.compile(
        model, f"quantize{{scheme={scheme}}}", (x,), backend="inductor", measure_latency=False
    )
    with torch.no_grad():
        assert far(compiled(x), compiled.program.run(x)) < HALF
