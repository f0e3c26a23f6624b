"""What the executorch backend lowers; most of it needs the package."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

import torchlathe as tl
from tests.backends.small_models import lowerable
from torchlathe.backends import CompiledModel
from torchlathe.backends.executorch import _apart, _dequantised
from torchlathe.backends.exporting import exported_program
from torchlathe.ir import Program, capture

needs_executorch = pytest.mark.skipif(
    find_spec("executorch") is None, reason="needs the package executorch"
)
SCHEMES = ("w8a8", "w8a16", "w4a16")


class Text(nn.Module):
    """A layer of text: (batch, tokens) ids to (batch, tokens, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def quantised(scheme: str) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Text().eval()
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("tokens", max=16)}
    program = capture(model, (torch.randint(0, 20, (2, 5)),), dynamic_shapes={"ids": sizes})
    return model, tl.PassManager(f"quantize{{scheme={scheme}}}", verify="off").run(program)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_integers_become_floating_weights(scheme: str) -> None:
    _, program = quantised(scheme)
    eager = CompiledModel(program, "eager")
    exported, boundary = exported_program(lowerable(program), largest=16, rewrite=_dequantised)
    read = [n for n in exported.graph.find_nodes(op="placeholder") if n.users]
    weights = [n.meta["val"] for n in read if n.name not in boundary.inputs]
    assert len(weights) >= 6
    assert all(weight.is_floating_point() for weight in weights)
    ids = torch.randint(0, 20, (3, 7))  # both axes are dynamic still
    (got,) = boundary.flat(list(exported.module()(ids)))
    torch.testing.assert_close(got, eager(ids), rtol=1e-5, atol=1e-5)


class Spread(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, dim=(-1,), correction=0, keepdim=True)
        both, _ = torch.var_mean(x)
        return (x - mean) / (variance + 1).sqrt() + both


def test_variance_and_mean_come_apart() -> None:
    x = torch.randn(3, 5)
    module = lowerable(capture(Spread(), (x,))).graph_module()
    _apart(module)
    assert "var_mean" not in module.code
    torch.testing.assert_close(module(x)[0], Spread()(x))


@needs_executorch
@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_and_length_are_both_dynamic(scheme: str) -> None:
    model, program = quantised(scheme)
    compiled = CompiledModel(program, "executorch", source=model)
    eager = CompiledModel(program, "eager", source=model)
    for shape in ((1, 2), (8, 16), (3, 9)):
        ids = torch.randint(0, 20, shape)
        # A last bit that rounds another way moves a value by a step, of 1/127 of a row's largest.
        torch.testing.assert_close(compiled(ids), eager(ids), rtol=0.02, atol=0.02)


@needs_executorch
def test_quantised_convolutions_of_one_dimension() -> None:
    # ExecuTorch makes new weights of two dimensions of theirs.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.GELU(), nn.Conv1d(16, 8, 3)).eval()
    x = torch.randn(2, 8, 12)
    program = tl.PassManager("quantize", verify="off").run(capture(model, (x,)))
    compiled = CompiledModel(program, "executorch", source=model)
    torch.testing.assert_close(
        compiled(x), CompiledModel(program, "eager")(x), rtol=0.02, atol=0.02
    )
