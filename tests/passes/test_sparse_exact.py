"""After sparse training, what is erased makes no difference: known models, and random ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import torchlathe as tl
from tests.passes.stacked_unets import StackedUnets
from tests.properties.random_nets import SOURCES, build, inputs, plans
from tests.zoo.oracle import in_float64, outputs, relative_error
from torchlathe.ir import InputError, OptionError
from torchlathe.optim import H2SPG, HESSO
from torchlathe.passes import Segments, ZeroInvariantGroups

# Sums of a few hundred float32 numbers, in another order.
FLOAT32 = 1e-5
FLOAT64 = 1e-9


def resnet() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=5
    )
    return ResNetForImageClassification(config), (torch.randn(4, 3, 32, 32),)


def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return ViTForImageClassification(config), (torch.randn(4, 3, 16, 16),)


def llama() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config), (torch.randint(0, 64, (2, 12)),)


def logits(found: Any) -> torch.Tensor:
    value: torch.Tensor = found.logits if hasattr(found, "logits") else found
    return value


@pytest.mark.parametrize("make", [resnet, vit, llama], ids=["batch-norm", "layer-norm", "rms-norm"])
def test_erased_is_trained(make: Any) -> None:
    torch.manual_seed(0)
    model, args = make()
    groups = tl.capture(model.eval(), args).analysis(ZeroInvariantGroups)
    optimizer = HESSO(
        groups, model, lr=1e-3, target_sparsity=0.5, start_step=1, pruning_steps=6, periods=2
    )
    model.train()
    for _ in range(10):
        found = logits(model(*args))
        loss = nn.functional.cross_entropy(
            found.flatten(0, -2), torch.randint(0, found.shape[-1], found.shape[:-1]).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert optimizer.zero_groups == int(optimizer.table.count * 0.5)
    assert int(optimizer.table.zero().sum()) == optimizer.zero_groups
    small = tl.compile(model, "structured-erase{zeros=true}", args, measure_latency=False)
    kept, whole = (sum(p.numel() for p in m.parameters()) for m in (small, model))
    assert kept < 0.75 * whole
    with torch.no_grad():
        torch.testing.assert_close(
            logits(small(*args)), logits(model(*args)), rtol=FLOAT32, atol=FLOAT32
        )


@pytest.mark.parametrize("source", SOURCES)
@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_erased_is_trained_for_random_networks(source: str, data: st.DataObject) -> None:
    plan = data.draw(plans(source))
    model = build(plan)
    (args, kwargs), _ = inputs(plan, 2)
    groups = tl.capture(model, args, kwargs).analysis(ZeroInvariantGroups)
    exact = [f for f in groups.prunable if f.exactness != "approximate"]
    assume(sum(f.extent - 1 for f in exact) > 0.5 * sum(f.extent for f in exact))
    model.requires_grad_()
    optimizer = HESSO(
        groups, model, base=torch.optim.SGD, lr=1e-3, target_sparsity=0.5, keep_at_least=1,
        pruning_steps=3,
    )  # fmt: skip
    for _ in range(4):
        # The networks are for inference alone; what trains them does not matter here.
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert int(optimizer.table.zero().sum()) >= optimizer.target == optimizer.zero_groups
    program = tl.capture(model, args, kwargs)
    small = tl.PassManager("structured-erase{zeros=true}").run(program)
    want = [t.detach() for t in outputs(model, (args, kwargs))]
    assert relative_error(outputs(in_float64(small.run), (args, kwargs)), want) <= FLOAT64


# -- branches --------------------------------------------------------------------------------------


def stacked(**options: Any) -> tuple[nn.Module, torch.Tensor, H2SPG]:
    torch.manual_seed(0)
    model = StackedUnets().eval()
    x = torch.randn(2, 3, 32, 32)
    segments = tl.capture(model, (x,)).analysis(Segments)
    options = {"lr": 1e-3, "target_sparsity": 0.3, "start_step": 1, "pruning_steps": 3} | options
    return model, x, H2SPG(segments, model, **options)


def stepped(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_branches_become_zero_and_are_erased_exactly() -> None:
    model, x, optimizer = stacked()
    stepped(model, x, optimizer, 5)
    assert optimizer.finished
    assert optimizer.chosen
    small = tl.compile(model, "erase-operators{zeros=true}", (x,), measure_latency=False)
    whole, kept = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    # As near to the target as whole branches come.
    assert 0.1 < 1 - kept / whole < 0.5
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=FLOAT32, atol=FLOAT32)
    stepped(model, x, optimizer, 2)
    again = tl.compile(model, "erase-operators{zeros=true}", (x,), measure_latency=False)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


def test_nothing_zero_is_nothing_erased() -> None:
    model, x, _ = stacked()
    small = tl.compile(model, "erase-operators{zeros=true}", (x,), measure_latency=False)
    assert not small.program.history[-1].changed


def test_branches_resume() -> None:
    model, x, optimizer = stacked()
    stepped(model, x, optimizer, 2)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    state = copy.deepcopy(state)
    stepped(model, x, optimizer, 3)
    other, _, resumed = stacked()
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    stepped(other, x, resumed, 3)
    assert resumed.chosen == optimizer.chosen
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_bad_input_of_branches() -> None:
    with pytest.raises(OptionError, match="no branch nowhere"):
        stacked(exclude=("nowhere",))
    with pytest.raises(OptionError, match="does not go with zeros"):
        tl.passes.EraseOperators(zeros=True, count=2)
    segments = tl.capture(StackedUnets().eval(), (torch.randn(1, 3, 32, 32),)).analysis(Segments)
    with pytest.raises(InputError, match="is missing"):
        H2SPG(segments, nn.Linear(2, 2), lr=0.1)
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    segments = tl.capture(plain, (torch.randn(1, 2),)).analysis(Segments)
    with pytest.raises(OptionError, match="can do without"):
        H2SPG(segments, plain, lr=0.1)
