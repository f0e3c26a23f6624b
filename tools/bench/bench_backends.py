"""Whether each backend agrees with the eager program, on models of other people's packages.

Each model is captured static and dynamic, goes through the pipeline, and is lowered by each
backend; the result is held against the eager program (`torchlathe.backends.agreeing`). A worker
process does one model after the other; a hang or a crash is a row, and another worker goes on with
the next model. Rows that are there are kept, so that a call goes on where the last one stopped.
Source: own.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from torchlathe.ir.files import write_text

if TYPE_CHECKING:
    from torchlathe.backends import CompiledModel
    from torchlathe.ir import Program

__all__ = ["BACKENDS", "MODELS", "main", "rows_of"]

RESULTS = Path(__file__).resolve().parent / "results" / "backends_cpu.json"
PIPELINE = "structured-erase{sparsity=0.3},quantize"
BACKENDS = ("onnx", "openvino", "inductor{freezing=true}", "aoti", "executorch")
_MOST_ADVICE: Final = 8  # an error names the families of one layer and those like it
LIMIT = 240.0  # seconds from one row to the next, by the clock
MODES: Final = ("static", "dynamic")

# Small ones of many families; those whose compilation takes longest are last.
MODELS = (
    *(f"transformers/{n}" for n in ("bert", "roberta", "albert", "distilbert", "electra")),
    *(f"transformers/{n}" for n in ("mpnet", "modernbert", "gpt2", "gpt_neox", "opt")),
    *(f"transformers/{n}" for n in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")),
    *(f"transformers/{n}" for n in ("t5", "bart", "whisper", "vit", "dinov2", "clip", "swin")),
    *(f"transformers/{n}" for n in ("convnext", "resnet", "segformer", "wav2vec2")),
    *(f"timm/{n}" for n in ("deit_tiny_patch16_224", "convnext_atto", "mixer_s32_224")),
    *(f"timm/{n}" for n in ("resnet10t", "lcnetv2_small", "repvgg_a0", "mobilenetv3_small_050")),
    *(f"torchvision/{n}" for n in ("resnet18", "squeezenet1_1", "vit", "mnasnet0_5", "swin")),
    *(f"timm/{n}" for n in ("fasternet_t0", "poolformer_s12", "starnet_s1", "ghostnet_050")),
    *(f"torchvision/{n}" for n in ("mobilenet_v2", "shufflenet_v2_x0_5", "regnet_x_400mf")),
)


def rows_of(name: str, backends: Sequence[str], passes: str) -> Iterator[dict[str, Any]]:
    """A row for each mode and backend of one model.

    Args:
        name: Of the model, in the coverage benchmark's zoo.
        backends: Text forms.
        passes: Text pipeline.
    """
    import torch

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
            changed = PassManager(passes, verify="off").run(program)
        except Error as error:
            for backend in backends:
                problem = {"outcome": type(error).__name__, "note": f"passes: {error}"[:400]}
                yield {"mode": mode, "backend": backend, **problem}
            continue
        for backend in backends:
            torch._dynamo.reset()
            gc.collect()
            start = time.perf_counter()
            row: dict[str, Any] = {"mode": mode, "backend": backend, "outcome": "agrees"}
            try:
                compiled, excluded = _lowered(program, changed, passes, backend, model)
                row |= {"excluded": excluded} if excluded else {}
                sizes = [entry.example(which) for which in range(1 + (mode == "dynamic"))]
                row |= _agreement(compiled, sizes)
            except Error as error:
                row |= {"outcome": type(error).__name__, "note": _told(error)}
            except Exception as error:  # what is no named error is a defect, and counted as one
                row |= {"outcome": "defect", "note": f"{type(error).__name__}: {error}"[:400]}
            yield {**row, "seconds": time.perf_counter() - start}


def _lowered(
    program: Program, changed: Program, passes: str, backend: str, model: Any
) -> tuple[CompiledModel, list[str]]:
    """Lower what the passes made of a program, and where the error advises to, with less erased.

    A module's own code cannot say every width; the backend "module" names the families to leave
    alone then. What is excluded is returned too.

    Raises:
        BackendError: There is no advice, or following it does not help.
    """
    from torchlathe.backends import CompiledModel
    from torchlathe.ir import BackendError
    from torchlathe.passes import PassManager

    excluded: list[str] = []
    for _ in range(_MOST_ADVICE):
        try:
            return CompiledModel(changed, backend, source=model), excluded
        except BackendError as error:
            advised = re.search(r"erased there, exclude=\[(.*?)\]( |,|$)", error.hint or "")
            names = re.findall(r'"([^"]+)"', advised[1]) if advised else []
            if not set(names) - set(excluded):
                raise
            excluded += [name for name in names if name not in excluded]
        listed = ",".join(f'"{name}"' for name in excluded)
        less = passes.replace("structured-erase{", f"structured-erase{{exclude=[{listed}],")
        changed = PassManager(less, verify="off").run(program)
    return CompiledModel(changed, backend, source=model), excluded


def _agreement(compiled: CompiledModel, inputs: Sequence[Any]) -> dict[str, Any]:
    """What the check found; of a backend with a check of its own, what is found here."""
    from torchlathe.backends import CompiledModel
    from torchlathe.tools.fidelity import compare_outputs

    if compiled.agreement is not None:
        return compiled.agreement.to_dict()
    eager = CompiledModel(compiled.program, "eager")
    found = compare_outputs(eager, compiled, inputs)
    error = max(output.relative_error or 0.0 for output in found)
    # The same ops in other shapes and orders: float32 rounding.
    tolerance = 2e-4
    row = {"error": error, "tolerance": tolerance, "sizes": len(inputs)}
    return row if error <= tolerance else {**row, "outcome": "DisagreementError"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark, or with ``--worker`` the models of it that are given, in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--backend", action="append", help=f"default: {', '.join(BACKENDS)}")
    parser.add_argument("--model", action="append", help="default: the table's")
    parser.add_argument("--first", type=int, help="so many of the table, which has the small first")
    parser.add_argument("--passes", default=PIPELINE)
    parser.add_argument("--minutes", type=float, default=5.0, help="stop after this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="do anew what does not agree")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parsed = parser.parse_args(argv)
    if parsed.worker:
        for name, backends in json.loads(parsed.worker).items():
            for row in rows_of(name, backends, parsed.passes):
                print("row " + json.dumps({"model": name, **row}), flush=True)
            print("done " + name, flush=True)
        return 0
    result: dict[str, Any] = {"rows": {}}
    with contextlib.suppress(OSError):
        result = json.loads(parsed.out.read_text(encoding="utf-8"))
    rows = result["rows"].setdefault(parsed.passes, {})
    end = time.monotonic() + 60 * parsed.minutes
    models = parsed.model or MODELS[: parsed.first]
    todo = _todo(rows, models, parsed.backend or BACKENDS, again=parsed.again)
    while todo and time.monotonic() < end:
        for name, new in _work(todo, parsed.passes, end):
            backends = todo.pop(name)
            kept = [row for row in rows.get(name, []) if row["backend"] not in backends]
            rows[name] = kept + new
            _write(parsed.out, result)
            short = (f"{r['mode']} {r['backend']}: {r['outcome']};" for r in new)
            print(time.strftime("%X"), name, *short, flush=True)
    print(f"{len(todo)} models are left", flush=True)
    return 0


def _todo(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    models: Sequence[str],
    backends: Sequence[str],
    *,
    again: bool,
) -> dict[str, list[str]]:
    """The backends by model that have no rows, or with ``again`` not only good ones."""
    found = {}
    for name in models:
        done = {row["backend"] for row in rows.get(name, [])}
        if again:
            done -= {r["backend"] for r in rows.get(name, []) if r["outcome"] != "agrees"}
        if wanted := [backend for backend in backends if backend not in done]:
            found[name] = wanted
    return found


def _work(
    todo: Mapping[str, Sequence[str]], passes: str, end: float
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each model, as a worker gives them, until it ends, hangs, or time is over."""
    command = _command(todo, passes)
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stderr is not None
    lines: queue.Queue[str] = queue.Queue()
    errors: queue.Queue[str] = queue.Queue()
    for stream, target in ((worker.stdout, lines), (worker.stderr, errors)):
        threading.Thread(target=_forward, args=(stream, target), daemon=True).start()
    left = list(todo)
    new: list[dict[str, Any]] = []
    try:
        while left and (time.monotonic() < end or new):
            try:
                line = lines.get(timeout=LIMIT)
            except queue.Empty:
                note = f"nothing came for {LIMIT:.0f} s"
                yield left[0], [*new, _missing(new, todo[left[0]], "limit", note)]
                return
            if line.startswith("row "):
                new.append(json.loads(line[4:]))
            elif line.startswith("done "):
                yield left.pop(0), new
                new = []
            elif not line:  # the end of the stream
                note = f"exit status {worker.wait()}: {_last(errors)}"
                yield left[0], [*new, _missing(new, todo[left[0]], "crash", note)]
                return
    finally:
        worker.kill()
        worker.wait()


def _command(todo: Mapping[str, Sequence[str]], passes: str) -> list[str]:
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_backends"]
    return [*command, "--passes", passes, "--worker", json.dumps(todo)]


def _forward(stream: IO[str], target: queue.Queue[str]) -> None:
    for line in stream:
        target.put(line.rstrip("\n") or " ")
    target.put("")


def _last(errors: queue.Queue[str]) -> str:
    lines = []
    with contextlib.suppress(queue.Empty):
        while line := errors.get(timeout=5):
            lines.append(line)
    return " ".join(lines)[-300:].strip()


def _told(error: Exception) -> str:
    """What an error says, without folders of this run."""
    return re.sub(r"/\S*/(?=[^/\s]+)", "", str(error))[:400]


def _missing(
    rows: Sequence[Mapping[str, Any]], backends: Sequence[str], problem: str, note: str
) -> dict[str, Any]:
    """A row for what was being done."""
    seen = {(row["mode"], row["backend"]) for row in rows}
    left = [(m, b) for m in MODES for b in backends if (m, b) not in seen]
    mode, backend = left[0] if left else (MODES[-1], backends[-1])
    return {"mode": mode, "backend": backend, "outcome": problem, "note": note}


def _write(path: Path, result: dict[str, Any]) -> None:
    from torchlathe.tools.bench.machine import machine

    result["machine"] = machine()
    write_text(path, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
