"""The ops under torch.export, Inductor and AOTInductor, all in one model, on a CPU."""

import json
import subprocess
import sys

import pytest
import torch

from tests.kernels.making import relative, w4, w4_signed, w8, w8_rows
from torchlathe.kernels.norm_quantise import op as norm  # noqa: F401
from torchlathe.kernels.w4a16 import op as w4a16

BRAIN = torch.bfloat16


class Model(torch.nn.Module):
    """A chain of every op."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._keep("four", w4(96, 200, 64, True, BRAIN))
        self._keep("eight", w8(200, 96, 0, BRAIN))
        self._keep("rows", w8_rows(96, 200))
        self._keep("signed", w4_signed(96, 96, 0))
        down, up = torch.randn(9, 96).to(BRAIN) / 20, torch.randn(200, 9).to(BRAIN) / 20
        self._keep("factors", w4a16.pad_rank(down, up))
        self._keep("last", w4(200, 96, 128, False, BRAIN)[:2])
        self.weight = torch.nn.Parameter(torch.rand(200))

    def _keep(self, name: str, tensors) -> None:
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"{name}_{i}", tensor)

    def _kept(self, name: str, count: int):
        return [getattr(self, f"{name}_{i}") for i in range(count)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops = torch.ops.torchlathe
        y = ops.w4a16_linear(x, *self._kept("four", 3), None, None, 96, 64, "silu")
        y = ops.w8a16_linear(y, *self._kept("eight", 2), None, x, 200)
        numbers, scales = ops.norm_quantise(y, self.weight, None, 1e-6, False, torch.int8)
        z = ops.w8a8_linear(numbers, scales, *self._kept("rows", 2), None, None, 96, BRAIN)
        numbers, scales, z = ops.add_norm_quantise(
            z, z, self.weight[:96], None, 1e-6, True, torch.int8
        )
        z = ops.w4a8_linear(numbers, scales, *self._kept("signed", 2), None, None, 96, BRAIN)
        last, factors = self._kept("last", 2), self._kept("factors", 2)
        return ops.w4a16_low_rank_linear(z, *last, None, *factors, None, y, 200, 128)


def exported() -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim("m")},)
    return torch.export.export(
        Model().eval(), (torch.randn(5, 200).to(BRAIN),), dynamic_shapes=dynamic
    )


def test_export_keeps_one_node_per_op(tmp_path) -> None:
    program = exported()
    called = [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and "torchlathe" in str(node.target)
    ]
    assert [name.split(".")[1] for name in called] == [
        "w4a16_linear",
        "w8a16_linear",
        "norm_quantise",
        "w8a8_linear",
        "add_norm_quantise",
        "w4a8_linear",
        "w4a16_low_rank_linear",
    ]
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(9, 200).to(BRAIN)
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(x), program.module()(x))


# Inductor keeps in fp32 what eager rounds to bf16 in between, and a number that is rounded to
# another integer in the middle of the chain moves all that follows: measured 0.003.
TOLERANCE = 0.02


@pytest.mark.cxx
def test_inductor() -> None:
    model = exported().module()
    x = torch.randn(5, 200).to(BRAIN)
    with torch.no_grad():
        assert relative(torch.compile(model)(x), model(x)) < TOLERANCE


@pytest.mark.cxx
@pytest.mark.slow
def test_aot_inductor_needs_none_of_it(tmp_path) -> None:
    """A package runs in a process that never heard of the ops."""
    program = exported()
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    x = torch.randn(9, 200).to(BRAIN)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        f"run = torch._inductor.aoti_load_package({path!r})\n"
        f"out = run(torch.load({str(tmp_path / 'x.pt')!r}))\n"
        f"torch.save(out, {str(tmp_path / 'out.pt')!r})\n"
        "import json; print(json.dumps([m for m in sys.modules if m == 'torchlathe']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    assert relative(torch.load(tmp_path / "out.pt"), program.module()(x)) < TOLERANCE
