"""Quantised layers in ONNX: the ops of ONNX Runtime compute what the logical form means."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests.backends.small_models import lowerable
from torchlathe.backends import CompiledModel
from torchlathe.backends.onnx_quantised import ops, rewrite_quantised
from torchlathe.ir import Program, capture
from torchlathe.passes import PassManager

needs_onnx = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="needs onnxruntime")


class Layers(nn.Module):
    """Two layers that read one value, a third of another width, and leading axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(64, 96), nn.Linear(64, 32, bias=False)
        self.c = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.c(torch.relu(self.a(x))), self.b(x)


X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))


def quantised(passes: str) -> Program:
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}}
    program = capture(Layers().eval(), (X,), dynamic_shapes=sizes)
    return PassManager(passes, verify="off").run(program)


def lowered_module(program: Program) -> fx.GraphModule:
    return lowerable(program).graph_module()


SCHEMES = [
    # Integer products are exact; scales multiply in another order.
    pytest.param("quantize", 0, "integer_linear", 1e-5, id="w8a8"),
    pytest.param("quantize{scheme=w4a16,group=32}", 0, "nbits_linear", 1e-5, id="w4a16"),
    pytest.param(
        "quantize{scheme=w4a16,group=32,symmetric=false}", 0, "nbits_linear", 1e-5, id="w4a16-zeros"
    ),
    pytest.param("quantize{scheme=w8a16}", 4, "nbits_linear", 1e-5, id="w8a16"),
]


@pytest.mark.parametrize(("passes", "level", "op", "tolerance"), SCHEMES)
def test_the_rewritten_graph_computes_the_same(
    passes: str, level: int, op: str, tolerance: float
) -> None:
    program = quantised(passes)
    want = CompiledModel(program)(X)
    module = lowered_module(program)
    assert rewrite_quantised(module, level=level) == 3
    targets = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    assert targets.count(f"torchlathe_onnx.{op}.default") == 3
    # a and b read one value, which is rounded once.
    rounded = targets.count("torchlathe_onnx.quantize_rows.default")
    assert rounded == (2 if op == "integer_linear" else 0)
    assert not any(target.startswith("torchlathe.") for target in targets)
    for x in (X, torch.randn(1, 2, 64)):
        want = CompiledModel(program)(x)
        for a, b in zip(want, module(x), strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


def test_what_onnxruntime_has_no_op_for_stays() -> None:
    program = quantised("quantize{scheme=w8a16}")
    module = lowered_module(program)
    assert rewrite_quantised(module, level=0) == 0
    assert rewrite_quantised(lowered_module(quantised("quantize{scheme=fp8}"))) == 0
    plain = capture(Layers().eval(), (X,))
    assert rewrite_quantised(lowered_module(plain)) == 0


def test_a_row_of_zeros_divides_by_nothing() -> None:
    numbers, scales = ops.quantize_rows(torch.zeros(2, 4))
    assert bool((numbers == 128).all())
    assert bool((scales > 0).all())
    extreme = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    numbers, _ = ops.quantize_rows(extreme)
    assert numbers.tolist() == [[255, 1, 128, 128]]


@needs_onnx
@pytest.mark.parametrize(("passes", "level", "op", "tolerance"), SCHEMES)
def test_onnxruntime_agrees(
    passes: str, level: int, op: str, tolerance: float, tmp_path: Path
) -> None:
    import onnx

    program = quantised(passes)
    backend = "onnx{int8-products=true}" if level else "onnx"
    compiled = CompiledModel(program, backend)  # checked at two sizes
    assert compiled.agreement is not None
    # Of int8 products, blocks of activations are rounded that the program does not round.
    assert compiled.agreement.error < (0.02 if level else 1e-3)
    path = tmp_path / "m.onnx"
    compiled.export(path)
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert ("MatMulIntegerToFloat" if op == "integer_linear" else "MatMulNBits") in kinds
    assert "MatMul" not in kinds


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_openvino_takes_the_meaning_of_the_ops() -> None:
    compiled = CompiledModel(quantised("quantize"), "openvino")
    assert compiled.agreement is not None
    assert compiled.agreement.sizes == 2
