"""quantize, and fuse-kernels after it, on models that nobody here wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchlathe import PassManager, capture
from torchlathe.ir.verifying import verify
from torchlathe.tools.compat import define_torchvision_ops


def _transformer(name: str) -> tuple[nn.Module, list[tuple[Any, ...]]]:
    define_torchvision_ops()
    import transformers

    torch.manual_seed(0)
    if name == "vit":
        config = transformers.ViTConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8,
        )  # fmt: skip
        model = transformers.ViTModel(config, add_pooling_layer=False)
        return model.eval(), [(torch.randn(4, 3, 32, 32),) for _ in range(3)]
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=100,
        )  # fmt: skip
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        config = transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32, use_cache=False
        )
        model = transformers.GPT2LMHeadModel(config)
    return model.eval(), [(torch.randint(0, 100, (4, 16)),) for _ in range(3)]


def _first(outputs: Any) -> torch.Tensor:
    found = outputs if isinstance(outputs, torch.Tensor) else next(iter(outputs.values()))
    assert isinstance(found, torch.Tensor)
    return found


def _check(
    model: nn.Module, data: list[tuple[Any, ...]], spec: str, bound: float, swept: int
) -> None:
    program = capture(model, data[0])
    after = PassManager(spec).run(program, calibration=data)
    verify(after, "full")
    with torch.no_grad():
        wanted, found = _first(program.run(*data[1])), _first(after.run(*data[1]))
        assert float((found - wanted).norm() / wanted.norm()) < bound
        rows = after.history[0].details["quantised"]
        errors = [row for row in rows if "output_error" in row]
        assert len(errors) == swept
        assert all(row["output_error"] <= row["output_error_nearest"] for row in errors)
        fused = PassManager("fuse-kernels{choose=rule}").run(after)
        # int8 products are exact, and float32 sums in another order differ in the last bits, which
        # may move a value over the middle between two numbers.
        assert float((_first(fused.run(*data[1])) - found).norm() / wanted.norm()) < 5e-3


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_eight_bits(name: str) -> None:
    model, data = _transformer(name)
    # Random weights; about twice the error that was found.
    _check(model, data, "quantize{scheme=w8a8}", 0.03, 0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_four_bits_by_gptq(name: str) -> None:
    model, data = _transformer(name)
    spec = "quantize{scheme=w4a8,group=32,method=gptq,balance=smoothquant}"
    _check(model, data, spec, 0.3, {"bert": 12, "gpt2": 8, "vit": 13}[name])


def test_experts_are_stored_small_and_read_as_they_were() -> None:
    define_torchvision_ops()
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, use_cache=False,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(0, 60, (2, 8))
    program = capture(model, (ids,))
    after = PassManager("quantize{scheme=w8a16}", verify="full").run(program)
    names = [row["layer"] for row in after.history[-1].details["quantised"]]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    with torch.no_grad():
        wanted, found = program.run(ids).logits, after.run(ids).logits
    # Random weights; about twice the error that was found.
    assert float((found - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.slow
def test_a_convolutional_network() -> None:
    define_torchvision_ops()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10).eval()
    data = [(torch.randn(4, 3, 64, 64),) for _ in range(2)]
    _check(model, data, "quantize{scheme=w8a16}", 0.05, 0)
    _check(model, data, "quantize{scheme=w4a16,group=32,method=gptq}", 0.5, 21)
