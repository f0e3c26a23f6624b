"""Whether each backend agrees with the eager program, on models of other people's packages.

Each model is captured static and dynamic, goes through the pipeline, and is lowered by each
backend; the result is held against the eager program (`torchlathe.backends.agreeing`). Each model
is a process of its own with a limit of time, so that a hang or a crash is a row. Source: own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torchlathe.ir.files import write_text

__all__ = ["BACKENDS", "MODELS", "main", "rows_of"]

RESULTS = Path(__file__).resolve().parent / "results" / "backends_cpu.json"
PIPELINE = "structured-erase{sparsity=0.3},quantize"
BACKENDS = ("onnx", "openvino", "inductor{freezing=true}", "aoti")
LIMIT = 420  # seconds for all of one model, by the clock

# Small ones, and of each family some: every one of them costs a C++ compilation per backend.
MODELS = (
    *(f"torchvision/{n}" for n in ("resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "vit")),
    *(f"torchvision/{n}" for n in ("squeezenet1_1", "swin", "regnet_x_400mf", "mnasnet0_5")),
    *(f"timm/{n}" for n in ("deit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050")),
    *(f"timm/{n}" for n in ("resnet10t", "poolformer_s12", "lcnetv2_small", "starnet_s1")),
    *(f"timm/{n}" for n in ("ghostnet_050", "fasternet_t0", "mixer_s32_224", "repvgg_a0")),
    *(f"transformers/{n}" for n in ("bert", "roberta", "albert", "distilbert", "electra")),
    *(f"transformers/{n}" for n in ("mpnet", "modernbert", "gpt2", "gpt_neox", "opt")),
    *(f"transformers/{n}" for n in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")),
    *(f"transformers/{n}" for n in ("t5", "bart", "whisper", "vit", "dinov2", "clip", "swin")),
    *(f"transformers/{n}" for n in ("convnext", "resnet", "segformer", "wav2vec2")),
)


def rows_of(name: str, backends: Sequence[str], passes: str) -> Iterator[dict[str, Any]]:
    """A row for each mode and backend of one model.

    Args:
        name: Of the model, in the coverage benchmark's zoo.
        backends: Text forms.
        passes: Text pipeline.
    """
    import torch

    from torchlathe.backends import CompiledModel
    from torchlathe.ir import Error, capture
    from torchlathe.passes import PassManager
    from torchlathe.tools.bench.coverage.zoo import ENTRIES
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    model = entry.build()
    args, kwargs = entry.example()
    for mode, shapes in (("static", None), ("dynamic", entry.dynamic_shapes)):
        try:
            program = capture(model, args, kwargs, dynamic_shapes=shapes)
            program = PassManager(passes, verify="off").run(program)
        except Error as error:
            yield {"mode": mode, "backend": "", "outcome": "passes", "note": error.message}
            continue
        for backend in backends:
            torch._dynamo.reset()
            start = time.perf_counter()
            row: dict[str, Any] = {"mode": mode, "backend": backend, "outcome": "agrees"}
            try:
                agreement = CompiledModel(program, backend, source=model).agreement
                assert agreement is not None
                row |= agreement.to_dict()
            except Error as error:
                row |= {"outcome": type(error).__name__, "note": str(error)[:400]}
            except Exception as error:  # what is no named error is a defect, and counted as one
                row |= {"outcome": "defect", "note": f"{type(error).__name__}: {error}"[:400]}
            yield {**row, "seconds": time.perf_counter() - start}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or with ``--one`` a single model of it in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backend", action="append", help=f"default: {', '.join(BACKENDS)}")
    parser.add_argument("--model", action="append", help="default: the table's")
    parser.add_argument("--passes", default=PIPELINE)
    parser.add_argument("--minutes", type=float, default=5.5, help="start no model after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    backends = tuple(parsed.backend or BACKENDS)
    if parsed.one:
        for row in rows_of(parsed.model[0], backends, parsed.passes):
            print("row " + json.dumps(row), flush=True)
        return 0
    end = time.monotonic() + 60 * parsed.minutes
    result: dict[str, Any] = {"rows": {}}
    with contextlib.suppress(OSError):
        result = json.loads(parsed.out.read_text(encoding="utf-8"))
    rows = result["rows"].setdefault(parsed.passes, {})
    for name in parsed.model or MODELS:
        done = {row["backend"] for row in rows.get(name, []) if row["outcome"] != "limit"}
        wanted = [backend for backend in backends if backend not in done]
        if not wanted or time.monotonic() > end:
            continue
        new = _in_a_process(name, wanted, parsed.passes)
        kept = [row for row in rows.get(name, []) if row["backend"] not in wanted]
        rows[name] = kept + new
        _write(parsed.out, result)
        print(name, *(f"{r['mode']} {r['backend']}: {r['outcome']};" for r in new), flush=True)
    return 0


def _in_a_process(name: str, backends: Sequence[str], passes: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_backends", "--one"]
    command += ["--model", name, "--passes", passes]
    for backend in backends:
        command += ["--backend", backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        text, note = done.stdout, done.stderr.strip()[-300:]
        problem = "crash" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
        problem, note = "limit", f"not done after {LIMIT} s"
    rows = [json.loads(line[4:]) for line in text.splitlines() if line.startswith("row ")]
    if problem:
        seen = {(row["mode"], row["backend"]) for row in rows}
        missing = [(m, b) for m in ("static", "dynamic") for b in backends if (m, b) not in seen]
        rows += [
            {"mode": mode, "backend": backend, "outcome": problem, "note": note}
            for mode, backend in missing[:1]
        ]
    return rows


def _write(path: Path, result: dict[str, Any]) -> None:
    from torchlathe.tools.bench.machine import machine

    result["machine"] = machine()
    write_text(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
