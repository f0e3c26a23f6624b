"""Dependency analysis and structured erase, against Torch-Pruning, side by side in one run.

For each model: time of the capture (apart), of the analysis, of analysis plus erase at half size,
and of these by the pass manager, without and with its verifying; interleaved with Torch-Pruning's
graph plus prune on the same machine; the peak memory of compile in a process of its own; and, with
``--coverage``, which models each of the two copes with when it is told nothing.

Correctness first: nothing is timed that gives wrong outputs. Source: own.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

from torchlathe.ir import Program, capture
from torchlathe.passes import PassContext, PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.tools.bench.erase_cases import CASES, COVERAGE, Case
from torchlathe.tools.bench.machine import machine
from torchlathe.tools.compat import define_torchvision_ops

__all__ = ["main", "measure_case", "measure_coverage", "measure_memory"]

RESULTS = Path(__file__).resolve().parent / "results" / "erase_cpu.json"
RATIO = 0.5
PIPELINE = f"structured-erase{{sparsity={RATIO}}}"
TOLERANCE = 1e-4  # float32, relative to the largest output


# -- the two contestants ---------------------------------------------------------------------


def captured(case: Case, model: torch.nn.Module) -> Program:
    """Capture a case's model with its dynamic shapes."""
    args, kwargs = case.inputs()
    return capture(model, args, kwargs, dynamic_shapes=case.dynamic_shapes)


def erase(program: Program) -> None:
    """Analysis and erase, in place, on a program that has no analysis yet."""
    StructuredErase(sparsity=RATIO).run(program, PassContext(program, spec=PIPELINE))


def managed(program: Program, verify: Literal["off", "fast"] = "off") -> Program:
    """The same by the pass manager, which copies the program and keeps a record."""
    return PassManager(PIPELINE, verify=verify).run(program)


def peer_prune(case: Case, model: torch.nn.Module, *, hints: bool = True) -> dict[str, Any]:
    """Torch-Pruning's graph and prune, in place; returns the options that it was given."""
    import torch_pruning  # type: ignore[import-untyped,unused-ignore]

    args, kwargs = case.inputs()
    options = case.peer_options(model) if hints else {}
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        kwargs or args,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        **options,
    )
    pruner.step()
    return options


def check(case: Case, model: torch.nn.Module) -> dict[str, Any]:
    """Erase once by each, run what comes out, and count parameters.

    Raises:
        RuntimeError: The erased program differs from its zeroed twin.
    """
    program = captured(case, model)
    args, kwargs = case.inputs()
    after = managed(program)

    def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for axis, indices in after.zeroed.get(name, {}).items():
            tensor = tensor.index_fill(axis, indices, 0)
        return tensor

    with torch.no_grad():
        got = after.run(*args, **kwargs)
        want = program.run(*args, replace_tensor=zeroed, **kwargs)
    error = _relative_error(got, want)
    if error > TOLERANCE:
        raise RuntimeError(f"{case.name}: erased differs from its zeroed twin by {error:.1e}")

    twin = copy.deepcopy(model)
    row: dict[str, Any] = {
        "parameters": _count(model.parameters()),
        "parameters_after": _count(after.parameters.values()),
        "error_f32": error,
        "peer_ok": True,
        "peer_parameters_after": None,
    }
    try:
        with _quiet():
            case.peer_patch(twin, peer_prune(case, twin))
            twin(*args, **kwargs)
        row["peer_parameters_after"] = _count(twin.parameters())
    except Exception as failure:
        row["peer_ok"] = False
        row["peer_error"] = _first_line(failure)
    return row


# -- measuring -------------------------------------------------------------------------------


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Time one case, both contestants in turn in each round.

    Units: seconds.
    """
    torch.manual_seed(0)
    model = case.build().eval()
    row: dict[str, Any] = {"case": case.name, **check(case, model)}
    times: dict[str, list[float]] = {}

    def timed(key: str, work: Callable[[], Any]) -> Any:
        # Each pays for the collection of its own garbage, not for walking what was there before.
        gc.collect()
        gc.freeze()
        start = time.perf_counter()
        result = work()
        times.setdefault(key, []).append(time.perf_counter() - start)
        gc.unfreeze()
        return result

    for _ in range(rounds):
        program = timed("capture_s", partial(captured, case, model))
        # Copies have no analysis yet.
        copies = [program.copy() for _ in range(4)]
        timed("analysis_s", partial(copies[0].analysis, ZeroInvariantGroups))
        timed("total_s", partial(erase, copies[1]))
        timed("managed_s", partial(managed, copies[2]))
        timed("verified_s", partial(managed, copies[3], "fast"))
        if row["peer_ok"]:
            twin = copy.deepcopy(model)
            with _quiet():
                timed("peer_s", partial(peer_prune, case, twin))
            del twin
    for key, values in times.items():
        row[key] = _quantiles(values)
    if row["peer_ok"]:
        row["ratio"] = row["total_s"]["p50"] / row["peer_s"]["p50"]
        row["ratio_managed"] = row["managed_s"]["p50"] / row["peer_s"]["p50"]
    return row


def measure_memory(name: str) -> dict[str, Any]:
    """Peak memory of compile, of its rewrites alone, and of one forward pass.

    Each in a new process. Units: bytes.
    """
    result: dict[str, Any] = {}
    for what in ("--memory-of", "--rewrites-of", "--forward-of"):
        command = [sys.executable, "-m", "torchlathe.tools.bench.bench_erase", what, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
        result.update(json.loads(done.stdout.strip().splitlines()[-1]))
    return result


def _forward_of(case: Case) -> dict[str, Any]:
    """What one forward pass of the original takes at its peak, in this process."""
    _warm_up()
    args, kwargs = case.inputs()
    model = case.build().eval()
    before = _resident()
    _reset_peak()
    with torch.no_grad():
        model(*args, **kwargs)
    return {"forward_bytes": _peak() - before}


def _memory_of(case: Case) -> dict[str, Any]:
    """What compile takes at its peak, in this process.

    ``ratio`` is the model with that to the weights before plus the weights after.
    """
    added, weights, erased = _memory_added(case)
    return {
        "model_bytes": weights,
        "erased_bytes": erased,
        "compile_bytes": added,
        "ratio": (weights + added) / (weights + erased),
    }


def _rewrites_of(case: Case) -> dict[str, Any]:
    """The same where the model is never run: neither verified nor measured."""
    added, weights, erased = _memory_added(case, verify="off")
    return {"rewrites_bytes": added, "rewrites_ratio": (weights + added) / (weights + erased)}


def _memory_added(case: Case, **options: Any) -> tuple[int, int, int]:
    """Resident bytes that compile adds at its peak to the model; weights before and after."""
    import torchlathe

    _warm_up()
    args, kwargs = case.inputs()
    model = case.build().eval()
    loaded = _resident()
    _reset_peak()
    compiled: Any
    if options:
        program = torchlathe.capture(model, args, kwargs, dynamic_shapes=case.dynamic_shapes)
        compiled = torchlathe.PassManager(PIPELINE, **options).run(program)
        added = _peak() - loaded
        after = [entry.tensor for entry in compiled.entries.values()]
    else:
        compiled = _compile(torchlathe, model, args, kwargs, case.dynamic_shapes)
        added = _peak() - loaded
        after = [*compiled.parameters(), *compiled.buffers()]
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    return added, weights, sum(t.nbytes for t in after)


def _warm_up() -> None:
    """What imports and first calls take is not the model's."""
    import torchlathe

    for package in ("torchvision.models", "transformers"):
        importlib.import_module(package)
    warm = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    warm.append(torch.nn.Linear(8 * 36, 8))
    _compile(torchlathe, warm, (torch.randn(2, 3, 8, 8),), {}, ({0: torch.export.Dim.DYNAMIC},))


def _compile(
    package: Any, model: torch.nn.Module, args: Any, kwargs: Any, dynamic: Any
) -> torch.nn.Module:
    compiled: torch.nn.Module = package.compile(
        model,
        PIPELINE,
        args,
        example_kwargs=kwargs,
        dynamic_shapes=dynamic,
        measure_latency=False,
    )
    return compiled


def measure_coverage(limit_s: float) -> list[dict[str, Any]]:
    """Which small models each contestant erases with no hints, each try in a new process."""
    rows = []
    for case in COVERAGE:
        row: dict[str, Any] = {"case": case.name}
        for who in ("torchlathe", "torch_pruning"):
            row[who] = _attempt(case.name, who, limit_s)
        rows.append(row)
    return rows


def _attempt(name: str, who: str, limit_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "torchlathe.tools.bench.bench_erase", "--attempt", name, who]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"outcome": f"no answer in {limit_s:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["killed"]
        return {"outcome": "fails", "error": lines[-1][:200]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**result, "process_s": time.perf_counter() - start}


def _attempt_here(case: Case, who: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = case.build().eval()
    args, kwargs = case.inputs()
    count = _count(model.parameters())
    start = time.perf_counter()
    if who == "torchlathe":
        program = captured(case, model)
        after = managed(program, "fast")
        seconds = time.perf_counter() - start
        after.run(*args, **kwargs)
        left = _count(after.parameters.values())
    else:
        with _quiet():
            peer_prune(case, model, hints=False)
        seconds = time.perf_counter() - start
        model(*args, **kwargs)
        left = _count(model.parameters())
    outcome = "ok" if left < count else "nothing erased"
    return {"outcome": outcome, "seconds": seconds, "parameters": count, "parameters_after": left}


# -- small parts -----------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _count(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200]


def _relative_error(got: Any, want: Any) -> float:
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in pairs if isinstance(a, torch.Tensor)
    )


def _quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7]}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# -- output ----------------------------------------------------------------------------------


def _show(result: dict[str, Any], console: Console) -> None:
    times = Table(title=f"seconds, median of {result['rounds']}; sizes in millions of parameters")
    sizes = ("model", "size", "left", "TP left")
    steps = ("capture", "analysis", "total", "managed", "verified", "TP total", "ratio")
    for column in (*sizes, *steps):
        times.add_column(column, justify="left" if column == "model" else "right")
    for row in result["cases"]:
        peer = row["peer_parameters_after"]
        times.add_row(
            row["case"],
            f"{row['parameters'] / 1e6:.1f}",
            f"{row['parameters_after'] / 1e6:.1f}",
            f"{peer / 1e6:.1f}" if peer else "-",
            *(f"{row[f'{step}_s']['p50']:.3f}" for step in steps[:5]),
            f"{row['peer_s']['p50']:.3f}" if row["peer_ok"] else row["peer_error"],
            f"{row['ratio']:.2f}" if row["peer_ok"] else "-",
        )
    console.print(times)
    if any("memory" in row for row in result["cases"]):
        memory = Table(title="peak memory of compile, MiB")
        for column in ("model", "weights", "erased", "one forward", "rewrites", "compile"):
            memory.add_column(column, justify="left" if column == "model" else "right")
        for column in ("rewrites / weights", "compile / weights"):
            memory.add_column(column, justify="right")
        for row in result["cases"]:
            m = row["memory"]
            cells = (f"{m[f'{key}_bytes'] / 2**20:.0f}" for key in _MEMORY)
            memory.add_row(row["case"], *cells, f"{m['rewrites_ratio']:.2f}", f"{m['ratio']:.2f}")
        console.print(memory)
    if result.get("coverage"):
        coverage = Table(title="erased with no hints")
        for column in ("model", "torchlathe", "Torch-Pruning"):
            coverage.add_column(column)
        for row in result["coverage"]:
            coverage.add_row(row["case"], *(_outcome(row[w]) for w in _WHO))
        console.print(coverage)


_MEMORY = ("model", "erased", "forward", "rewrites", "compile")
_WHO = ("torchlathe", "torch_pruning")


def _outcome(attempt: dict[str, Any]) -> str:
    if attempt["outcome"] == "ok":
        share = attempt["parameters_after"] / attempt["parameters"]
        return f"ok, {share:.0%} left, {attempt['seconds']:.2f} s"
    return str(attempt["outcome"]) + (f": {attempt['error']}" if "error" in attempt else "")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(CASES), help="names, by commas")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one round, the times alone")
    parser.add_argument("--coverage", action="store_true", help="try small models without hints")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each such try")
    parser.add_argument("--json", type=Path, help=f"where to write (default {RESULTS.name})")
    parser.add_argument("--memory-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--rewrites-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--forward-of", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--attempt", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if unknown := [name for name in options.models.split(",") if name not in CASES]:
        parser.error(f"unknown models {', '.join(unknown)}; there are {', '.join(CASES)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables and write the JSON file; returns the exit status."""
    options = _arguments(argv)
    define_torchvision_ops()
    torch.set_num_threads(options.threads)
    for name, measure in (
        (options.memory_of, _memory_of),
        (options.rewrites_of, _rewrites_of),
        (options.forward_of, _forward_of),
    ):
        if name:
            sys.stdout.write(json.dumps(measure(CASES[name])) + "\n")
            return 0
    if options.attempt:
        name, who = options.attempt
        case = next(c for c in COVERAGE if c.name == name)
        sys.stdout.write(json.dumps(_attempt_here(case, who)) + "\n")
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=110)
    rounds = 1 if options.quick else options.rounds
    result: dict[str, Any] = {"benchmark": "erase", **machine(), "rounds": rounds, "cases": []}
    for name in options.models.split(","):
        console.print(f"[dim]{name} ...[/dim]", highlight=False)
        row = measure_case(CASES[name], rounds)
        if not options.quick:
            row["memory"] = measure_memory(name)
        result["cases"].append(row)
    if options.coverage:
        result["coverage"] = measure_coverage(options.limit)
    _show(result, console)
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
