"""What others make of the same models: torchao here, llm-compressor in its own environment."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import nn

from torchlathe.backends.checkpoints import StoredLinear
from torchlathe.tools.checkpoints import load_checkpoint

__all__ = ["LlmCompressor", "bits_with_scales", "torchao_rows"]

SCRIPT: Final = Path(__file__).resolve().parent / "quantize_peer.py"

Score = Callable[[Callable[..., Any]], dict[str, float]]


def torchao_rows(
    model: nn.Module, score: Score, console: Console, done: set[str]
) -> Iterator[dict[str, Any]]:
    """A row for each scheme of torchao that torchlathe has too; none where it is not installed."""
    try:
        import torchao
        from torchao.quantization import (
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )
    except ImportError:
        console.print("torchao is not installed")
        return
    four = getattr(torch, "int4")  # noqa: B009  # torch has it, and its types do not
    configurations = {
        "torchao w8a8": (Int8DynamicActivationInt8WeightConfig(), 8, 0),
        "torchao w8a16": (Int8WeightOnlyConfig(), 8, 0),
        "torchao w4a16": (IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(32)), 4, 32),
    }
    for name, (configuration, bits, group) in configurations.items():
        if name in done:
            continue
        copied = copy.deepcopy(model)
        quantize_(copied, configuration)
        row = {
            "contestant": name,
            "spec": type(configuration).__name__,
            "bits": bits_with_scales(model, bits, group),
            "version": torchao.__version__,
            **score(copied),
        }
        console.print(f"{name}: {row}")
        yield row


def bits_with_scales(model: nn.Module, bits: int, group: int) -> float:
    """Bits a weight of all linear layers, without zero points, as torchao's defaults are.

    Args:
        model: As it is before it is quantised.
        bits: Of a number.
        group: Columns that share a scale of 16 bits; 0 for a row with one of 32.
    """
    total = weights = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            weights += rows * columns
            total += rows * (bits * columns + (16 * -(-columns // group) if group else 32))
    return total / weights


@dataclass(frozen=True)
class LlmCompressor:
    """llm-compressor in an environment of its own, and a folder for its checkpoints.

    Attributes:
        python: The Python of that environment.
        folder: Finished checkpoints are kept there, and not made again.
    """

    python: str
    folder: str

    def rows(
        self,
        model: Any,
        words: Mapping[str, torch.Tensor],
        layers: str | None,
        score: Callable[[nn.Module], dict[str, float]],
        console: Console,
        done: set[str],
    ) -> Iterator[dict[str, Any]]:
        """A row for each recipe.

        Args:
            model: Of transformers, with a dense checkpoint of its own.
            words: Tokens and mask, (sentences, tokens) each, to calibrate with.
            layers: Class of the parts that are done one after the other; None for a decoder.
            score: Of a model that `load_checkpoint` gave.
            console: For a line a row.
            done: Names that need not be measured.
        """
        from safetensors.torch import save_file

        root = Path(self.folder) / type(model).__name__
        root.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(root / "model")
        save_file({name: words[name].contiguous() for name in ("input_ids", "attention_mask")},
                  root / "calibration.safetensors")  # fmt: skip
        kind = ["--layers", layers] if layers else ["--decoder"]
        subprocess.run([self.python, str(SCRIPT), str(root), *kind], check=True)
        for file in sorted(root.glob("*/row.json")):
            told = json.loads(file.read_text(encoding="utf-8"))
            name = f"llm-compressor {told['name']}"
            if name in done:
                continue
            loaded = load_checkpoint(file.parent)
            row = {
                "contestant": name,
                "spec": told["recipe"],
                "bits": _bits(loaded),
                "version": told["version"],
                "seconds": told["seconds"],
                **score(loaded),
            }
            console.print(f"{name}: {row}")
            yield row


def _bits(model: nn.Module) -> float:
    """Bits a weight of the quantised layers, with scales of groups in 16 bits."""
    bits = weights = 0
    for module in model.modules():
        if not isinstance(module, StoredLinear):
            continue
        stored = module.stored
        weights += stored.rows * stored.columns
        bits += 8 * stored.values.nbytes + stored.scales.numel() * (16 if stored.group else 32)
        bits += 0 if stored.zeros is None else stored.form.bits * stored.zeros.numel()
    return bits / weights
