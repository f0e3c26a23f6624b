"""Memory of gptq by depth: random Llamas in bf16 whose weights are mapped from a file.

Each depth is a process of its own. Weights lie in a safetensors file that is mapped, so that the
anonymous memory of the process is what quantising adds: the stored numbers, the batches, and the
work on one layer. Finished layers are kept in a folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe.ir.cost.latency import cache_directory
from torchlathe.ir.files import write_text
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.memory import PeakMemory

__all__ = ["RESULTS", "SIZES", "main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "quantize_memory.json"
_SPEC: Final = 'quantize{scheme=w4a16,method=gptq,checkpoint="FOLDER"}'
# Sizes of Llama 3.2 1B, and half of them with few words.
SIZES: Final[dict[str, dict[str, int]]] = {
    "tiny": {
        "vocab_size": 500, "hidden_size": 512, "intermediate_size": 2048,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "small": {
        "vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip


def _model(size: str, layers: int) -> Any:
    """The architecture alone, on the meta device."""
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES[size],
        num_hidden_layers=layers,
        tie_word_embeddings=True,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def make_weights(size: str, layers: int, file: Path) -> None:
    """Random weights of such a model, in one file."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, like in _model(size, layers).named_parameters():
        value = torch.ones(like.shape, dtype=like.dtype)
        tensors[name] = value if like.dim() == 1 else value.normal_(0, 0.02, generator=generator)
    save_file(tensors, file)


def mapped_model(size: str, layers: int, file: Path) -> torch.nn.Module:
    """The model with weights that are mapped from the file: none is read before it is needed."""
    from safetensors.torch import load_file

    model: Any = _model(size, layers)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model.load_state_dict(load_file(file), strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    found: torch.nn.Module = model.eval()
    return found


def measure(size: str, layers: int, folder: Path, tokens: int, console: Console) -> dict[str, Any]:
    """Quantise one such model, and watch."""
    from torchlathe import PassManager, capture

    file = folder / f"{size}-{layers}.safetensors"
    if not file.exists():
        # In a process of its own: what makes the weights holds all of them.
        code = "import sys; from pathlib import Path; "
        code += "from torchlathe.tools.bench.bench_streaming import make_weights; "
        code += "make_weights(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))"
        draft = file.with_suffix(".draft")
        subprocess.run([sys.executable, "-c", code, size, str(layers), str(draft)], check=True)
        draft.rename(file)
    model = mapped_model(size, layers, file)
    generator = torch.Generator().manual_seed(1)
    words = SIZES[size]["vocab_size"]
    data = [torch.randint(0, words, (1, tokens), generator=generator) for _ in range(4)]
    program = capture(model, (data[0],))
    bytes_before = program.cost().bytes
    finished = folder / f"{size}-{layers}-layers"
    spec = _SPEC.replace("FOLDER", str(finished))
    start = time.perf_counter()

    def progress(text: str) -> None:
        console.print(f"{time.perf_counter() - start:7.1f} s  {text}", highlight=False)

    with PeakMemory() as memory:
        after = PassManager(spec, verify=False).run(program, calibration=data, progress=progress)
    statistics = after.history[-1].statistics
    block = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n)
    bits = float(statistics["bits_per_weight"])
    return {
        "size": size,
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": bytes_before,
        "block_bytes": 2 * block,
        "stored_bytes": int(float(statistics["weights"]) * bits / 8),
        "peak_bytes": memory.rise,
        "seconds": time.perf_counter() - start,
        "resumed": statistics["resumed"],
        "tokens": 4 * tokens,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure the depths that are not there yet.

    Args:
        argv: The words of the command line; by default those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of each of four batches")
    parser.add_argument("--folder", type=Path, default=cache_directory() / "streaming")
    parser.add_argument("--one", action="store_true", help="measure one depth in this process")
    options = parser.parse_args(argv)
    console = Console()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        row = measure(options.size, options.depths[0], options.folder, options.tokens, console)
        _add(options.output, row)
        console.print(row)
        return 0
    rows = _rows(options.output)
    known = {(row["size"], row["layers"]) for row in rows}
    for depth in options.depths:
        if (options.size, depth) in known:
            continue
        words = ["-m", __spec__.name, "--one", "--size", options.size, "--depths", str(depth)]
        words += ["--output", str(options.output), "--folder", str(options.folder)]
        words += ["--tokens", str(options.tokens)]
        subprocess.run([sys.executable, *words], check=True)
    return 0


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _add(path: Path, row: dict[str, Any]) -> None:
    data = {"machine": machine(), "rows": [*_rows(path), row]}
    write_text(path, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
