"""insert-adapters and quantize-cores: exact starts, numbers of parameters, and what they train."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchlathe import PassManager, capture
from torchlathe.ir import OptionError, PassError, Program
from torchlathe.ir.verifying import verify
from torchlathe.passes import InsertAdapters, QuantizeCores
from torchlathe.passes.rewrite.tensor_networks.adapters import (
    AdapterSize,
    KroneckerLayer,
    kronecker_layer,
    mixing,
    whole_matrix,
)
from torchlathe.tools.compat import define_torchvision_ops


class Residual(nn.Module):
    """Two residual layers with norms between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + nn.functional.dropout(self.outer(torch.relu(self.inner(x))), 0.1, self.training)
        return self.head(self.norm(x))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Residual().eval(), (torch.randn(4, 16),), dynamic_shapes="auto")


def trained(program: Program) -> set[str]:
    return {name for name, p in program.parameters.items() if p.requires_grad}


@settings(max_examples=20)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99)
)
def test_a_layer_is_the_sum_of_kronecker_products(terms, ins, outs, rank, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    ins, outs = ins * terms, outs * terms
    made = kronecker_layer(ins, outs, terms, rank, generator)
    layer = KroneckerLayer(made.left.double(), made.right.double(), made.bias.double())
    shared = mixing(terms, generator).double()
    products = [torch.kron(shared[i], layer.left[i] @ layer.right[i]) for i in range(terms)]
    torch.testing.assert_close(whole_matrix(shared, layer), sum(products))
    zero = kronecker_layer(ins, outs, terms, rank, generator, zero=True)
    assert float(whole_matrix(shared.float(), zero).abs().sum()) == 0
    size = AdapterSize(ins, outs, terms, rank)
    there = kronecker_layer(outs, ins, terms, rank, generator)
    both = [t for part in (made, there) for t in (part.left, part.right, part.bias)]
    assert size.parameters == sum(t.numel() for t in both)
    assert size.shared == shared.numel()


def test_the_program_is_as_it_was_and_only_adapters_train(program: Program) -> None:
    after = PassManager("insert-adapters{reduction=4,norms=false}", verify="full").run(program)
    x = torch.randn(5, 16)
    # Zeros are added; another allocation of the inputs may round products in another way.
    torch.testing.assert_close(after.run(x), program.run(x), rtol=0, atol=1e-6)
    size = AdapterSize(16, 4, 4, 1)
    names = trained(after)
    assert names == {"adapters.mixing.weight"} | {
        f"outer.adapter.{layer}.{part}"
        for layer in ("down", "up")
        for part in ("left", "right", "bias")
    }
    count = sum(after.parameters[name].numel() for name in names)
    assert count == size.parameters + size.shared
    assert after.history[-1].statistics["added_parameters"] == count
    # Those of the program that was given still train.
    assert "inner.weight" in trained(program)


def test_gradients_reach_what_starts_at_zero(program: Program) -> None:
    after = PassManager("insert-adapters{reduction=4}").run(program)
    assert {"norm.weight", "norm.bias"} <= trained(after)
    after.run(torch.randn(5, 16)).square().sum().backward()
    parameters = after.parameters
    gradient = parameters["outer.adapter.up.right"].grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0
    assert parameters["outer.weight"].grad is None


def test_it_can_be_healed_and_split(program: Program) -> None:
    """After a split, adapters alone bring the program nearer to the original."""
    data = [torch.randn(32, 16) for _ in range(4)]
    spec = (
        "kronecker-split{rank=3,method=svd,include=[outer*],time=false},"
        "insert-adapters{reduction=2,norms=false,include=[head*]},heal{method=distil,steps=30}"
    )
    after = PassManager(spec).run(program, calibration=data)
    healed = after.history[-1].statistics
    assert healed["loss_after"] < healed["loss_before"]
    assert torch.equal(after.tensor("head.weight"), program.tensor("head.weight"))


def test_where_adapters_go(program: Program) -> None:
    chosen = PassManager("insert-adapters{include=[head*],terms=2,activation=relu}").run(program)
    assert any("head.adapter" in name for name in chosen.parameters)
    none = PassManager("insert-adapters{include=[head*],terms=3}").run(program)
    assert not none.history[-1].changed
    text = " ".join(d["message"] or "" for d in none.history[-1].diagnostics)
    assert "its 8 outputs are no multiple of terms=3" in text
    with pytest.raises(OptionError, match="reduction is 0"):
        InsertAdapters(reduction=0)


CASES = [
    ("exclude=[*EncDecAttention*]", 161_728, 48),
    ("include=[*DenseReluDense.wo*]", 104_704, 24),
]


@pytest.mark.slow
def test_numbers_of_compacter_on_t5_base() -> None:
    """0.073 % and 0.047 % of 222.9 million are those of the paper, section 4, table 1."""
    define_torchvision_ops()
    from transformers import T5Config, T5Model

    config = T5Config(
        vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_heads=12, use_cache=False
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.randint(0, 100, (2, 7))
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
        program = capture(T5Model(config).eval(), (), inputs)
    assert program.cost().parameters == 222_903_552
    for option, count, adapters in CASES:
        after = PassManager(f"insert-adapters{{{option}}}").run(program)
        found = after.history[-1].statistics
        assert found["trainable_parameters"] == count
        assert found["adapters"] == adapters
        norms = 62 * 768
        assert count == adapters * AdapterSize(768, 24, 4, 1).parameters + 4**3 + norms


# -- cores in few bits ----------------------------------------------------------------------------


def split_program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    program = capture(model.eval(), (torch.randn(4, 64),), dynamic_shapes="auto")
    spec = "tensor-train-split{rank=20,method=svd,time=false}"
    return PassManager(spec).run(program)


@pytest.mark.parametrize(("scheme", "bits"), [("w8a16", 8), ("w4a16", 4)])
def test_cores_in_few_bits(scheme: str, bits: int) -> None:
    before = split_program()
    after = PassManager(f"quantize-cores{{scheme={scheme}}}").run(before)
    verify(after, "full")
    found = after.history[-1].statistics
    assert found["cores"] == 4
    assert bits <= found["bits_per_weight"] <= bits + 3
    assert after.cost().bytes < before.cost().bytes * (bits + 3) / 32 + 600  # biases stay
    x = torch.randn(7, 64)
    wanted = before.run(x)
    # Two layers of two cores: relative errors add up as squares, and biases leave them as they are.
    rounding = 4 * float(found["mean_weight_error"])
    assert float((after.run(x) - wanted).norm() / wanted.norm()) < 2 * rounding**0.5
    assert {n.rpartition("_")[2] for n in trained(after)} >= {"scale"}
    again = PassManager("quantize-cores").run(after)
    assert not again.history[-1].changed


def test_patterns_of_cores() -> None:
    before = split_program()
    after = PassManager("quantize-cores{include=[0.core1*]}").run(before)
    assert after.history[-1].statistics["cores"] == 1
    with pytest.raises(PassError, match="matches no core"):
        PassManager("quantize-cores{exclude=[nothing]}").run(before)
    with pytest.raises(OptionError):
        QuantizeCores(group=7)
    plain: Any = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    assert not PassManager("quantize-cores").run(plain).history[-1].changed
