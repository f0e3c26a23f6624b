"""Quantised models against the originals and peers: fidelity at the same bits, and speed.

The encoder is MiniLM with its pretrained weights, the language model the small one that is trained
on Python's documentation. torchao is a contestant where it can be imported, llm-compressor by
``--llm-compressor``; all quantise the same weights, and are measured on the same data by the same
code. Rows that are there are kept with ``--resume``, those of peers that are not here in any case.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from rich.console import Console

from torchlathe import capture
from torchlathe.backends import CompiledModel, get_backend
from torchlathe.ir.files import write_text
from torchlathe.passes import FuseKernels, PassManager
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.bench.minilm import without_padding
from torchlathe.tools.bench.quantize_peers import LlmCompressor, torchao_rows

__all__ = ["main"]

RESULTS: Final = Path(__file__).resolve().parent / "results" / "quantize_cpu.json"
_TEST_BATCHES: Final = 6
_INTEGERS: Final = {
    "w8a8": "quantize",
    "w4a16": "quantize{scheme=w4a16,group=32,clip=none}",
    "w4a16, clipped": "quantize{scheme=w4a16,group=32}",
    "w4a16, gptq": "quantize{scheme=w4a16,group=32,method=gptq}",
    "w8a8, smoothquant, products inserted": "quantize{balance=smoothquant,insert=true}",
    "w4a8, gptq": "quantize{scheme=w4a8,group=32,method=gptq}",
    "mxfp4, gptq": "quantize{scheme=mxfp4,method=gptq}",
    "nvfp4, gptq": "quantize{scheme=nvfp4,method=gptq}",
    "w2a16, gptq": "quantize{scheme=w2a16,method=gptq}",
    "4 and 8 bits, gptq": "quantize{scheme=w4a16,group=32,bytes=BUDGET,method=gptq}",
    "w4a16, awq, products inserted": "quantize{scheme=w4a16,group=32,balance=awq,insert=true}",
    "w4a16, rotated": "quantize{scheme=w4a16,group=32,rotate=true}",
    "w4a16, gptq, no order": "quantize{scheme=w4a16,group=32,method=gptq,act-order=false}",
    "w4a16, gptq, zero points": "quantize{scheme=w4a16,group=32,method=gptq,symmetric=false}",
    "w4a16, gptq, zero points, whole ranges": "quantize{scheme=w4a16,group=32,method=gptq,"
    "symmetric=false,clip=none}",
    "w4a16, awq, zero points, products inserted": "quantize{scheme=w4a16,group=32,balance=awq,"
    "insert=true,symmetric=false}",
    "w8a16": "quantize{scheme=w8a16}",
    "w8a16, gptq": "quantize{scheme=w8a16,method=gptq}",
    "fp8": "quantize{scheme=fp8}",
    "mxfp4": "quantize{scheme=mxfp4}",
    "nvfp4": "quantize{scheme=nvfp4}",
    "w2a16": "quantize{scheme=w2a16}",
}


def _contestants(budget: float) -> dict[str, str]:
    return {name: spec.replace("BUDGET", f"{budget:g}") for name, spec in _INTEGERS.items()}


def minilm(
    console: Console, done: set[str], peer: LlmCompressor | None
) -> Iterator[dict[str, Any]]:
    """Cosine of embeddings to those of the original, a row for each contestant."""
    from torchlathe.tools.demo_minilm import compare_embeddings, embed, load_encoder
    from torchlathe.tools.sentence_encoder import SentenceEncoder, documentation_sentences

    encoder, tokenizer = load_encoder()
    sentences = documentation_sentences()
    random.Random(0).shuffle(sentences)
    test, seen = sentences[:96], sorted(sentences[96:224], key=len)
    batches = without_padding(tokenizer, seen)
    axes = {0: torch.export.Dim("batch", max=1024), 1: torch.export.Dim("sequence", max=512)}
    shapes = dict.fromkeys(("input_ids", "attention_mask"), axes)
    program = capture(encoder, (), dict(tokenizer(seen[:32])), dynamic_shapes=shapes)
    before = embed(encoder, tokenizer, test)

    def score(model: Callable[..., Any]) -> dict[str, float]:
        found = compare_embeddings(before, embed(model, tokenizer, test), test)
        return {"cosine": found.cosine, "worst": found.worst_cosine}

    yield from torchao_rows(encoder, score, console, done)
    if peer is not None:
        words: Any = tokenizer(seen)
        yield from peer.rows(
            encoder.bert, words, "BertLayer", lambda m: score(SentenceEncoder(m)), console, done
        )
    yield from _ours(program, batches, _contestants(0.62), score, console, done)


def characters(
    console: Console, done: set[str], peer: LlmCompressor | None
) -> Iterator[dict[str, Any]]:
    """Perplexity of the next character, and divergence from the original, a row for each."""
    from torchlathe.tools.bench.character_model import batches, perplexity, trained

    model = trained()
    data = list(batches(4, 16, seed=1))
    test = list(batches(_TEST_BATCHES, 16, test=True, seed=1))
    program = capture(model, (data[0],), dynamic_shapes="auto")

    with torch.no_grad():
        wanted = [model(tokens).log_softmax(-1) for tokens in test]

    def score(model: Callable[..., Any]) -> dict[str, float]:
        return {
            "perplexity": float(perplexity(model, test)),
            "divergence": _divergence(model, test, wanted),
        }

    if "original" not in done:
        yield {"contestant": "original", "spec": "", "bits": 32.0, **score(model)}
    yield from torchao_rows(model, score, console, done)
    if peer is not None:
        tokens = torch.cat(data)
        words = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        yield from peer.rows(
            model.body,
            words,
            None,
            lambda m: score(lambda tokens: m(input_ids=tokens).logits),
            console,
            done,
        )
    yield from _ours(program, data, _contestants(0.2), score, console, done)


def _divergence(
    model: Callable[..., Any], test: list[torch.Tensor], wanted: list[torch.Tensor]
) -> float:
    """Mean Kullback-Leibler divergence of predictions from those of the original, in nats.

    It tells models apart that are all within the chance of perplexity.
    """
    total = 0.0
    with torch.no_grad():
        for tokens, want in zip(test, wanted, strict=True):
            found = model(tokens).log_softmax(-1)
            total += float((want.exp() * (want - found)).sum(-1).mean(dtype=torch.float64))
    return total / len(test)


def _ours(
    program: Any,
    data: list[Any],
    contestants: dict[str, str],
    score: Callable[[Callable[..., Any]], dict[str, float]],
    console: Console,
    done: set[str],
) -> Iterator[dict[str, Any]]:
    for name, spec in contestants.items():
        if name in done:
            continue
        start = time.perf_counter()
        after = PassManager(spec, verify=False).run(program, calibration=data)
        seconds = time.perf_counter() - start
        statistics = after.history[-1].statistics
        row = {
            "contestant": name,
            "spec": spec,
            "bits": statistics["bits_per_weight"],
            "bytes": after.cost().bytes,
            "seconds": seconds,
            **score(CompiledModel(after)),
        }
        errors = [r for r in after.history[-1].details["quantised"] if "output_error" in r]
        row["better_than_nearest"] = sum(
            r["output_error"] < r["output_error_nearest"] for r in errors
        )
        row["swept"] = len(errors)
        console.print(f"{name}: {row}")
        yield row


def speeds(
    console: Console, layers: int, sizes: list[tuple[int, int]], seconds: float
) -> Iterator[dict[str, Any]]:
    """Seconds of an encoder of BERT-base's sizes through the inductor, in turn."""
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, attn_implementation="sdpa")
    model = BertModel(config, add_pooling_layer=False).eval()

    class Encoder(torch.nn.Module):
        def __init__(self, body: torch.nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.body(tokens).last_hidden_state
            return found

    for batch, length in sizes:
        tokens = torch.randint(0, config.vocab_size, (batch, length))
        calls: dict[str, Callable[[], Any]] = {}
        outputs = {}
        # What torch.compile makes of the model, with its weights as constants as ours are.
        plain, ours = "inductor{freezing=true,short-attention=0}", "inductor{freezing=true}"
        for name, spec, dtype, backend in (
            ("fp32", "", torch.float32, plain),
            ("bf16", "", torch.bfloat16, plain),
            ("w8a8, fp32 between", "quantize", torch.float32, ours),
            ("w8a8, bf16 between", "quantize", torch.bfloat16, ours),
        ):
            program = capture(Encoder(deepcopy(model).to(dtype)), (tokens,))
            if spec:
                fuse = FuseKernels(runtime="inductor")
                program = PassManager([spec, fuse], verify=False).run(program)
            compiled = CompiledModel(program, get_backend(backend))
            start = time.perf_counter()
            with torch.no_grad():
                outputs[name] = compiled(tokens).float()
            console.print(
                f"{batch}x{length} {name}: compiled in {time.perf_counter() - start:.0f} s"
            )
            calls[name] = partial(compiled, tokens)
        times: dict[str, list[float]] = {name: [] for name in calls}
        count = 3 if batch * length < 512 else 1
        began = time.monotonic()
        with torch.no_grad():
            for turn in range(25):
                if turn >= 7 and time.monotonic() - began > seconds:
                    break
                for name, call in calls.items():
                    start = time.perf_counter()
                    for _ in range(count):
                        call()
                    times[name].append((time.perf_counter() - start) / count)
        found = {name: median(values) for name, values in times.items()}
        reference = outputs["fp32"]
        for name, value in found.items():
            row = {
                "tokens": [batch, length],
                "contestant": name,
                "seconds": value,
                "least": min(times[name]),
                "to_fp32": found["fp32"] / value,
                "to_bf16": found["bf16"] / value,
                "error": float((outputs[name] - reference).norm() / reference.norm()),
                "layers": layers,
                "threads": torch.get_num_threads(),
            }
            console.print(f"{row}")
            yield row


def _instructions() -> str:
    flags = [
        name
        for name, present in (
            ("amx", torch.cpu._is_amx_tile_supported()),
            ("avx512_vnni", torch.cpu._is_avx512_vnni_supported()
             if hasattr(torch.cpu, "_is_avx512_vnni_supported")
             else torch.cpu._is_vnni_supported()),
            ("avx512_bf16", torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        )
        if present
    ]  # fmt: skip
    return f"{torch.backends.cpu.get_cpu_capability()} {' '.join(flags)}"


def _done(rows: list[dict[str, Any]], again: list[str]) -> set[str]:
    """Names of rows that are kept; those of peers always are."""

    def kept(name: str) -> bool:
        peer = name.startswith(("llm-compressor", "torchao"))
        return peer or not any(part in name for part in again)

    return {row["contestant"] for row in rows if _whole(row) and kept(row["contestant"])}


def _whole(row: dict[str, Any]) -> bool:
    """Whether a row has all that rows have now."""
    return "perplexity" not in row or "divergence" in row


def _put(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a row, or put it in the place of the one of the same contestant."""
    for index, old in enumerate(rows):
        if (old["contestant"], old.get("tokens")) == (row["contestant"], row.get("tokens")):
            rows[index] = row
            return
    rows.append(row)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=("minilm", "characters", "speeds"))
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument(
        "--again", nargs="+", default=[], help="with --resume: parts of names to measure again"
    )
    parser.add_argument("--layers", type=int, default=12, help="of the timed encoder")
    parser.add_argument("--sizes", nargs="+", default=["1x128", "8x128"], help="batch x tokens")
    parser.add_argument(
        "--seconds", type=float, default=90, help="of the rounds of a size, of which 7 run anyway"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--llm-compressor",
        nargs=2,
        metavar=("PYTHON", "DIR"),
        help="the Python of an environment that has it, and a folder for what it writes",
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after that")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(0)
    console = Console()
    result = json.loads(parsed.out.read_text()) if parsed.out.is_file() else {}
    sizes = [(int(a), int(b)) for a, b in (size.split("x") for size in parsed.sizes)]
    peer = None if parsed.llm_compressor is None else LlmCompressor(*parsed.llm_compressor)
    start = time.monotonic()
    for part in parsed.only or ("minilm", "characters", "speeds"):
        rows = result.setdefault(part, [])
        done = _done(rows, parsed.again) if part != "speeds" and parsed.resume else set()
        measure = minilm if part == "minilm" else characters
        fresh = (
            speeds(console, parsed.layers, sizes, parsed.seconds)
            if part == "speeds"
            else measure(console, done, peer)
        )
        for row in fresh:
            _put(rows, row)
            write_text(parsed.out, json.dumps(result, indent=1) + "\n")
            if time.monotonic() - start > 60 * parsed.minutes:
                return 0
    result |= machine() | {"instructions": _instructions()}
    write_text(parsed.out, json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
