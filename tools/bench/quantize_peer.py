"""Quantises a transformers model by llm-compressor: a script for an environment of its own.

``bench_quantize --llm-compressor PYTHON`` runs it with the Python of an environment that has
llm-compressor, which asks for other versions of packages than torchlathe does; so nothing of
torchlathe is imported. It reads ``model`` and ``calibration.safetensors`` of a folder, and writes a
checkpoint for each recipe, which `torchlathe.backends.checkpoints` reads back to be measured with
the very code that measures all others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["main"]


def _weights(bits: int, group: int, *, symmetric: bool, observer: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "dynamic": False,
    }
    return found | ({"observer": observer} if observer else {})


def _tokens() -> dict[str, Any]:
    return {
        "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
    }  # fmt: skip


def _groups(
    bits: int,
    group: int = 0,
    *,
    symmetric: bool = True,
    observer: str | None = None,
    inputs: bool = False,
) -> dict[str, Any]:
    weights = _weights(bits, group, symmetric=symmetric, observer=observer)
    own = {"targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": own | ({"input_activations": _tokens()} if inputs else {})}
    }


def _recipes(*, decoder: bool) -> dict[str, Callable[[], list[Any]]]:
    """Modifiers by the name of a row; those of a decoder alone know its norms."""
    modifiers = "llmcompressor.modifiers"
    plain = import_module(f"{modifiers}.quantization").QuantizationModifier
    gptq = import_module(f"{modifiers}.gptq").GPTQModifier
    awq = import_module(f"{modifiers}.transform.awq").AWQModifier
    smoothquant = import_module(f"{modifiers}.transform.smoothquant").SmoothQuantModifier
    found: dict[str, Callable[[], list[Any]]] = {
        "w8a8": lambda: [plain(**_groups(8, inputs=True))],
        "w4a16": lambda: [plain(**_groups(4, 32))],
        "w4a16, mse": lambda: [plain(**_groups(4, 32, observer="mse"))],
        "w4a16, gptq": lambda: [gptq(**_groups(4, 32))],
        "w4a16, gptq, mse": lambda: [gptq(**_groups(4, 32, observer="mse"))],
        "w4a16, gptq, zero points": lambda: [gptq(**_groups(4, 32, symmetric=False))],
        "w4a8, gptq": lambda: [gptq(**_groups(4, 32, inputs=True))],
    }
    if decoder:
        found |= {
            "w4a16, awq": lambda: [awq(), plain(**_groups(4, 32))],
            "w4a16, awq, zero points": lambda: [
                awq(), plain(**_groups(4, 32, symmetric=False))
            ],
            "w8a8, smoothquant": lambda: [
                smoothquant(smoothing_strength=0.5), plain(**_groups(8, inputs=True))
            ],
            "w8a8, smoothquant, gptq": lambda: [
                smoothquant(smoothing_strength=0.5), gptq(**_groups(8, inputs=True))
            ],
        }  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    """Quantise; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with model and calibration.safetensors")
    parser.add_argument("--layers", help="class of the parts that are done one after the other")
    parser.add_argument("--decoder", action="store_true")
    parsed = parser.parse_args(argv)

    import torch
    import transformers
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader

    llmcompressor: Any = import_module("llmcompressor")
    torch.set_num_threads(1)
    # Pinned memory, which it asks for, is there with an accelerator alone; no number depends on it.
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    # It insists on a tokenizer, which has nothing to do: the data are tokens.
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    data = load_file(parsed.folder / "calibration.safetensors")
    count = next(iter(data.values())).shape[0]
    rows: Any = []
    for index in range(count):
        keep = data["attention_mask"][index].bool()
        rows.append({name: tensor[index][keep] for name, tensor in data.items()})
    auto = transformers.AutoModelForCausalLM if parsed.decoder else transformers.AutoModel
    for name, recipe in _recipes(decoder=parsed.decoder).items():
        folder = parsed.folder / name.replace(", ", "-").replace(" ", "-")
        if (folder / "row.json").is_file():
            continue
        torch.manual_seed(0)
        model = auto.from_pretrained(parsed.folder / "model", dtype=torch.float32)
        modifiers = recipe()
        start = time.perf_counter()
        llmcompressor.oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(rows, batch_size=1),
            recipe=modifiers,
            num_calibration_samples=count,
            sequential_targets=[parsed.layers] if parsed.layers else None,
        )
        seconds = time.perf_counter() - start
        model.save_pretrained(folder, save_compressed=True)
        told = {
            "name": name,
            "recipe": ", ".join(type(modifier).__name__ for modifier in modifiers),
            "seconds": seconds,
            "version": llmcompressor.__version__,
        }
        (folder / "row.json").write_text(json.dumps(told))
        sys.stderr.write(f"{name}: {seconds:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
