"""The models of the end-to-end benchmark, with the pipelines that were chosen for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

__all__ = ["CASES", "Case", "Inputs", "Model"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_FFN: Final = "include=[*.intermediate.dense.weight:0]"
_FUSED: Final = "fuse-kernels{runtime=inductor}"
_FROZEN: Final = "inductor{freezing=true}"


@dataclass(frozen=True)
class Model:
    """A model with what it is run on.

    Attributes:
        module: In eval mode.
        example: To capture and check with.
        test: To measure time and fidelity on; no pass has seen it.
        calibration: Batches for passes, of the size of the example.
    """

    module: nn.Module
    example: Inputs
    test: Inputs
    calibration: list[Any]


@dataclass(frozen=True)
class Case:
    """A case of the benchmark.

    Attributes:
        name: In the table.
        make: Gives the model; the same for each call.
        weights: "pretrained" or "random".
        pipelines: Passes of torchlathe, each with a backend.
    """

    name: str
    make: Callable[[], Model]
    weights: str
    pipelines: tuple[tuple[str, str], ...]


def _minilm() -> Model:
    from torchlathe.tools.demo_minilm import load_encoder
    from torchlathe.tools.sentence_encoder import documentation_sentences

    model, tokens = load_encoder()
    sentences = documentation_sentences()
    starts = [*range(0, 96, 16), *range(160, 672, 16)]  # between them is the test
    batches = [_padded(tokens(sentences[i : i + 16])) for i in starts]
    test = _padded(tokens(sentences[100:116]))
    return Model(model, ((), batches[0]), ((), test), batches)


def _padded(batch: dict[str, torch.Tensor], length: int = 48) -> dict[str, torch.Tensor]:
    """One length for all, since every runtime gets a static graph."""
    pad = torch.nn.functional.pad
    return {name: pad(value, (0, length - value.shape[1])) for name, value in batch.items()}


def _bert() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()

    def one() -> dict[str, torch.Tensor]:
        ids = torch.randint(1000, 30000, (4, 64))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Model(model, ((), one()), ((), one()), [one() for _ in range(8)])


def _vision(name: str, batch: int) -> Callable[[], Model]:
    def make() -> Model:
        import torchvision

        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None).eval()
        if name.startswith("vit"):  # its head is made of zeros, and the cosine of zeros is none
            torch.nn.init.normal_(model.heads.head.weight, std=0.02)
        example, test, *more = (torch.randn(batch, 3, 224, 224) for _ in range(6))
        return Model(model, ((example,), {}), ((test,), {}), more)

    return make


def _erased(share: float, include: str = _FFN) -> str:
    options = "importance=wanda,compensate=true,round-to=64"  # whole registers of int8
    return f"structured-erase{{sparsity={share},{include},{options}}}"


CASES: Final = {
    case.name: case
    for case in (
        Case(
            "MiniLM-L6 (16 sentences)",
            _minilm,
            "pretrained",
            (
                (f"quantize,{_FUSED}", _FROZEN),
                ("quantize", "onnx"),
                ("quantize{scheme=w8a16}", "openvino"),
                (f"{_erased(0.05)},quantize,{_FUSED}", _FROZEN),
                (f"{_erased(0.1)},quantize,{_FUSED}", _FROZEN),
                (f"{_erased(0.1)},quantize", "onnx"),
                (f"{_erased(0.1)},quantize{{scheme=w8a16}}", "openvino"),
            ),
        ),
        Case(
            "BERT-base size (4 x 64)",
            _bert,
            "random",
            (
                (f"quantize,{_FUSED}", _FROZEN),
                ("quantize", "onnx"),
                ("quantize{scheme=w8a16}", "openvino"),
                (f"{_erased(0.1)},quantize,{_FUSED}", _FROZEN),
            ),
        ),
        Case(
            "ResNet-50 size (2 x 224)",
            _vision("resnet50", 2),
            "random",
            (
                ("", "openvino"),
                ("", _FROZEN),
                ("quantize{scheme=w8a16}", "openvino"),
            ),
        ),
        Case(
            "ViT-B/16 size (2 x 224)",
            _vision("vit_b_16", 2),
            "random",
            (
                (f"quantize,{_FUSED}", _FROZEN),
                ("quantize", "onnx"),
                ("quantize{scheme=w8a16}", "openvino"),
                (f"{_erased(0.1, 'include=[*.mlp.0.weight:0]')},quantize,{_FUSED}", _FROZEN),
            ),
        ),
    )
}
