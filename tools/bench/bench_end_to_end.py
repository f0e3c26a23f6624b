"""End to end on this machine: original models on several runtimes, against torchlathe's pipelines.

Each contestant is measured in turn with the original under the inductor, round by round, with the
same inputs and threads, so that each has a ratio that drift of the machine hardly touches, and the
benchmark can go on after any of them. Fidelity is the least cosine of a row of the output, on
inputs that no pass has seen. Source: own; int8 of ONNX Runtime is
``onnxruntime.quantization.quantize_dynamic``, that of torchao
``Int8DynamicActivationInt8WeightConfig`` under the inductor.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from torchlathe.ir.files import write_text
from torchlathe.tools.bench.end_to_end.cases import CASES, Case, Model
from torchlathe.tools.bench.end_to_end.contestants import (
    BASE,
    artefact,
    compressed,
    contestants,
)

__all__ = ["CASES", "main", "measure", "prepare"]

RESULTS = Path(__file__).resolve().parent / "results" / "end_to_end_cpu.json"
ROUNDS = 40
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    case: Case,
    rows: dict[str, dict[str, Any]],
    parsed: argparse.Namespace,
    save: Callable[[], None],
) -> int:
    """Measure what has no row yet, until time is over.

    Args:
        case: The model.
        rows: By name of the contestant; new ones are added.
        parsed: The command line.
        save: Called after each row.

    Returns:
        How many contestants are left.
    """
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    torch.set_num_threads(parsed.threads)
    end = time.monotonic() + 60 * parsed.minutes
    model = case.make()
    made = contestants(case, model, parsed.work, parsed.torchao)
    todo = [name for name in made if _wanted(rows.get(name), name, parsed)]
    base: Callable[..., Any] | None = None
    while todo and time.monotonic() < end:
        name = todo.pop(0)
        start = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            if base is None:
                base = _warm(made[BASE](), model)
            row |= _measured(base if name == BASE else made[name](), base, model, parsed)
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {error}"[:300]
        row["seconds"] = time.perf_counter() - start
        rows[name] = row
        gc.collect()
        save()
        print(f"  {name}: {_line(row)}", flush=True)
    return len(todo)


def prepare(case: Case, parsed: argparse.Namespace) -> int:
    """Make the compressed programs of a case, so that what is measured need not wait for passes.

    Returns:
        How many are left when time is over.
    """
    import torchlathe as tl
    from torchlathe.tools.compat import define_torchvision_ops

    define_torchvision_ops()
    torch.set_num_threads(parsed.threads)
    end = time.monotonic() + 60 * parsed.minutes
    model = case.make()
    todo = list(dict.fromkeys(passes for passes, _ in case.pipelines if passes))
    todo = [p for p in todo if not artefact(case, p, parsed.work).exists()]
    while todo and time.monotonic() < end:
        passes = todo.pop(0)
        start = time.perf_counter()
        run = tl.load(compressed(case, model, passes, parsed.work), backend="eager", mmap=True)
        row = {**_fidelity(model, run), "seconds": time.perf_counter() - start}
        print(f"  {passes}: {_line(row)}", flush=True)
    return len(todo)


def _wanted(row: dict[str, Any] | None, name: str, parsed: argparse.Namespace) -> bool:
    if parsed.contestant and not any(part in name for part in parsed.contestant):
        return False
    if row is None or parsed.again:
        return True
    if "problem" in row:
        return False
    return (row.get("threads"), row.get("clock")) != (parsed.threads, parsed.clock)


def _warm(run: Callable[..., Any], model: Model) -> Callable[..., Any]:
    args, kwargs = model.test
    with torch.inference_mode():
        run(*args, **kwargs)
    return run


def _measured(
    run: Callable[..., Any], base: Callable[..., Any], model: Model, parsed: argparse.Namespace
) -> dict[str, Any]:
    """Fidelity, and samples of a contestant and of the base in the same rounds."""
    from torchlathe.tools.model_bench.comparing import interleaved

    row = _fidelity(model, run)
    args, kwargs = model.test
    # The base is also measured against itself, which says how large a difference means nothing.
    found = interleaved(
        [base, run],
        args,
        kwargs,
        seconds=parsed.seconds,
        rounds=ROUNDS,
        clock=CLOCKS[parsed.clock],
    )
    how = {"threads": parsed.threads, "clock": parsed.clock}
    return {**row, "base_ms": found[0], "ms": found[1], **how}


def _fidelity(model: Model, run: Callable[..., Any]) -> dict[str, Any]:
    from torchlathe.tools.fidelity import compare_outputs

    found = compare_outputs(_first(model.module), _first(run), [model.test])
    return {"cosine": min(f.worst_cosine or 0.0 for f in found)}


def _line(row: dict[str, Any]) -> str:
    from torchlathe.tools.latency import quantile

    if "problem" in row:
        return str(row["problem"])
    text = f"cosine {row['cosine']:.5f}"
    if "ms" in row:
        ratios = [a / b for a, b in zip(row["base_ms"], row["ms"], strict=True)]
        text += f", {quantile(row['ms'], 0.5):.1f} ms, {quantile(ratios, 0.5):.2f}x"
    return f"{text} ({row['seconds']:.0f} s)"


def _first(run: Callable[..., Any]) -> Callable[..., Any]:
    """The first tensor of what a model gives, which all runtimes have in one place."""
    from torch.utils import _pytree as pytree

    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        leaves = pytree.tree_leaves(run(*args, **kwargs))
        first: torch.Tensor = next(x for x in leaves if isinstance(x, torch.Tensor))
        return first

    return call


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; what is measured already is left alone."""
    parser = argparse.ArgumentParser(description="End to end on this machine")
    parser.add_argument("--case", action="append", help="part of a name; default: all")
    parser.add_argument("--contestant", action="append", help="part of a name; default: all")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument(
        "--prepare", action="store_true", help="run the passes alone, and print their fidelity"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each contestant")
    parser.add_argument("--minutes", type=float, default=6.0, help="begin no contestant after this")
    parser.add_argument("--torchao", metavar="DIR", help="folder with torchao (pip install -t)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "torchlathe-end-to-end",
        help="where compressed programs are kept",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parsed = parser.parse_args(argv)
    from torchlathe.tools.bench.machine import machine

    result: dict[str, Any] = {"cases": {}}
    with contextlib.suppress(OSError):
        result = json.loads(parsed.out.read_text(encoding="utf-8"))

    def save() -> None:
        result["machine"] = machine()
        write_text(parsed.out, json.dumps(result, indent=1) + "\n")

    for name, case in CASES.items():
        if parsed.case and not any(part in name for part in parsed.case):
            continue
        print(name, flush=True)
        if parsed.prepare:
            left = prepare(case, parsed)
        else:
            own = result["cases"].setdefault(name, {"weights": case.weights, "rows": {}})
            left = measure(case, own["rows"], parsed, save)
        print(f"  {left} are left", flush=True)
        if left:
            return 0  # the next call goes on here
    return 0


if __name__ == "__main__":
    sys.exit(main())
