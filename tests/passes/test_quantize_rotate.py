"""Rotating the residual stream: exact before rounding, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir import Program
from torchlathe.ir.verifying import check_equivalence
from torchlathe.passes import PassContext
from torchlathe.passes.rewrite.quantising.rotating import orthogonal, rotate
from torchlathe.tools.compat import define_torchvision_ops


def llama(*, tied: bool = False) -> tuple[nn.Module, Program, list[torch.Tensor]]:
    define_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.body(ids, use_cache=False).logits

    data = [torch.randint(0, 60, (4, 16)) for _ in range(3)]
    net = Logits().eval()
    return net, capture(net, (data[0],)), data


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.integers(0, 2**31))
def test_the_matrix_is_orthogonal(width: int, seed: int) -> None:
    matrix = orthogonal(width, seed)
    identity = torch.eye(width, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, identity, atol=1e-12)


def test_a_power_of_two_is_a_hadamard_matrix() -> None:
    # Sixteen rows: every entry a quarter, to the last bit.
    assert torch.equal(orthogonal(16).abs(), torch.full((16, 16), 0.25, dtype=torch.float64))


def test_a_llama_is_rotated_exactly() -> None:
    _, program, _ = llama()
    after = program.copy()
    assert rotate(after, PassContext(after)) == 48
    check = check_equivalence(program, after)
    assert check.passed
    # New weights are rounded to float32, 6e-8 of each, and errors of layers add up.
    assert check.max_rel_error < 1e-5
    norms = [t for name, t in after.parameters.items() if "norm" in name]
    assert norms
    assert all(torch.equal(t, torch.ones_like(t)) for t in norms)


def test_outliers_of_a_stream_are_spread() -> None:
    net, _, data = llama()
    with torch.no_grad():
        # Two channels that are written a hundredfold and read with a hundredth.
        for name, weight in net.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight[:2] *= 30
            if "embed" in name:
                weight[:, :2] *= 30
    program = capture(net, (data[0],))
    errors = []
    for spec in ("quantize", "quantize{rotate=true}"):
        after = PassManager(spec).run(program, calibration=data)
        with torch.no_grad():
            wanted, found = program.run(data[1]), after.run(data[1])
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.8 * errors[0]


def test_zeros_that_a_rotation_takes_are_told() -> None:
    _, program, data = llama()
    warned = {}
    for rotated in ("", ",rotate=true"):
        spec = f"sparsify-nm{{method=magnitude}},quantize{{scheme=w4a16,group=16{rotated}}}"
        after = PassManager(spec).run(program, calibration=data)
        warned[rotated] = [
            str(told["message"])
            for told in after.history[-1].diagnostics
            if told["severity"] == "warning" and "zeros" in str(told["message"])
        ]
    assert not warned[""]
    # Seven layers in each of two blocks and the last one; embeddings had no zeros.
    (told,) = warned[",rotate=true"]
    assert told.startswith("15 weights had zeros that the rotation did not keep: body.")


def test_tied_embeddings_cannot_take_the_last_norm() -> None:
    _, program, _ = llama(tied=True)
    before = program.fingerprint()
    ctx = PassContext(program)
    assert rotate(program, ctx) == 0
    assert program.fingerprint() == before
    assert "cannot move into what reads it" in ctx.diagnostics[0].message


@pytest.mark.parametrize("layer", [nn.LayerNorm(32), nn.Sigmoid()])
def test_other_ops_refuse(layer: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
            self.out = nn.Linear(32, 4)
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(torch.relu(x))
            x = x + self.b(self.layer(x)) + self.c(self.layer(x))
            return self.out(x)

    program = capture(Net().eval(), (torch.randn(2, 32),))
    ctx = PassContext(program)
    assert rotate(program, ctx) == 0
    assert "does more than a linear map" in ctx.diagnostics[0].message
