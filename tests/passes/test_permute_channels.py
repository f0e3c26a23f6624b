import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from torchlathe.ir import OptionError
from torchlathe.passes import PermuteChannels, ZeroInvariantGroups
from torchlathe.passes.rewrite.sparsifying.ordering import kept_energy, search_order
from torchlathe.passes.rewrite.sparsifying.permute_channels import permute_units


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 12), groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_an_order_is_a_permutation_and_never_keeps_less(rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(rows, 4 * groups, generator=generator).square()
    order = search_order(energy, 2, 4, rounds=10, generator=generator)
    assert torch.equal(order.sort().values, torch.arange(4 * groups))
    assert kept_energy(energy[:, order], 2, 4) >= kept_energy(energy, 2, 4)


def test_the_best_of_all_orders_is_found_for_two_groups():
    generator = torch.Generator().manual_seed(3)
    energy = torch.rand(3, 8, generator=generator).square()
    best = max(
        kept_energy(energy[:, [*first, *(set(range(8)) - {*first})]], 2, 4)
        for first in itertools.combinations(range(8), 4)
    )
    order = search_order(energy, 2, 4, rounds=20, generator=generator)
    # Swaps of one pair of columns may end in a local optimum, near the best.
    assert kept_energy(energy[:, order], 2, 4) >= best - 0.02


def test_planted_columns_are_spread_out():
    energy = torch.full((16, 32), 1e-3)
    energy[:, :16] = 1.0  # half of the columns hold all, and stand next to each other
    generator = torch.Generator().manual_seed(0)
    order = search_order(energy, 2, 4, rounds=60, generator=generator)
    assert kept_energy(energy, 2, 4) < 0.51
    assert kept_energy(energy[:, order], 2, 4) > 0.99


class Attention(nn.Module):
    """Residual stream, norm, attention, and a gated layer with its halves in one weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.gate_up = nn.Linear(32, 128)
        self.down = nn.Linear(64, 32)
        self.head = nn.Linear(32, 30)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).view(*tokens.shape, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.flatten(2))
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.head(x + self.down(nn.functional.silu(gate) * up))


def test_any_order_of_any_family_leaves_the_outputs():
    torch.manual_seed(0)
    model, x = Attention().double().eval(), torch.randint(30, (2, 5))
    program = tl.capture(model, (x,))
    families = program.analysis(ZeroInvariantGroups)
    orders = {family: torch.randperm(family.extent) for family in families.prunable}
    assert len(orders) >= 3
    with program.edit() as edit:
        permute_units(edit, families, orders)
    changed = [
        n for n in program.entries if not torch.equal(program.tensor(n), model.state_dict()[n])
    ]
    assert "gate_up.weight" in changed
    # Sums in another order, in float64.
    torch.testing.assert_close(program.run(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_models_of_others_keep_their_outputs(name):
    torch.manual_seed(0)
    if name == "resnet":
        from torchlathe.tools.compat import define_torchvision_ops

        define_torchvision_ops()
        import timm

        model, inputs = (
            timm.create_model("resnet10t", num_classes=7).eval(),
            torch.randn(2, 3, 64, 64),
        )
    else:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=60, max_position_embeddings=32,
        )  # fmt: skip
        model, inputs = BertForSequenceClassification(config).eval(), torch.randint(60, (2, 8))
    found = tl.compile(model, "permute-channels{rounds=5}", (inputs,), measure_latency=False)
    record = found.program.history[0]
    assert record.changed
    assert record.verification is not None
    assert record.verification["passed"]
    assert record.statistics["kept_after"] > record.statistics["kept_before"]


def test_less_is_lost_in_the_new_order():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randint(30, (2, 5))
    errors = []
    for text in ("sparsify-nm{method=magnitude}", "permute-channels,sparsify-nm{method=magnitude}"):
        found = tl.compile(model, text, (x,), measure_latency=False)
        errors.append(found.program.history[-1].statistics["mean_error"])
    assert errors[1] < errors[0]


@pytest.mark.parametrize("options", [{"pattern": "block"}, {"pattern": "4:2"}, {"rounds": 0}])
def test_options_out_of_range(options):
    with pytest.raises(OptionError):
        PermuteChannels(**options)
