"""Measuring several models side by side."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import Error, InputError
from torchlathe.tools.fidelity import compare_outputs
from torchlathe.tools.latency import tensor_text
from torchlathe.tools.model_bench.contestants import Contestant, contestant, inputs_of
from torchlathe.tools.model_bench.rows import ModelBench, ModelRow

__all__ = ["bench_models", "interleaved"]

_SAMPLE_SECONDS = 2e-3  # below this, one sample times several calls
_LEAST_ROUNDS = 5
_WORKER_SECONDS = 600


def bench_models(
    names: Sequence[str],
    *,
    inputs: str | None = None,
    dynamic: bool = False,
    seconds: float = 10.0,
    rounds: int = 200,
    memory: bool = True,
    seed: int = 0,
    progress: Callable[[str], object] = lambda _: None,
) -> ModelBench:
    """Compare models or artefacts with the first of them.

    Latency is measured in this process, all models in turn in each round. Peak memory is that of a
    process for each model. What cannot be loaded, lowered or run is a row that says why.

    Args:
        names: Models as the command line names them; ``NAME@BACKEND`` lowers one.
        inputs: Inputs as text; by default those of the first model.
        dynamic: Capture with a dynamic batch what is lowered here.
        seconds: For the rounds, all models together; five rounds are taken in any case.
        rounds: At most so many.
        memory: Measure peak memory.
        seed: Of random weights and inputs.
        progress: Called with a line for each step.

    Raises:
        InputError: Fewer than one model, or the first cannot be measured.
    """
    if not names:
        raise InputError("there is nothing to compare", hint="name at least one model")
    args, kwargs = inputs_of(names[0], inputs, seed)
    made: list[Contestant | None] = []
    rows: list[ModelRow] = []
    for name in names:
        progress(f"loading {name}")
        one, row = _load(name, args, kwargs, dynamic, seed)
        made.append(one)
        rows.append(row)
    first = made[0]
    if first is None:
        raise InputError(f"the first model cannot be measured: {rows[0].problem}")
    progress("measuring fidelity")
    for index, one in enumerate(made):
        if one is not None and not rows[index].problem:
            rows[index] = _faithful(rows[index], first, one, args, kwargs)
    progress("measuring latency")
    usable = [i for i, one in enumerate(made) if one is not None and not rows[i].problem]
    runs = [made[i].run for i in usable]  # type: ignore[union-attr]
    samples = interleaved(runs, args, kwargs, seconds=seconds, rounds=rounds)
    for index, taken in zip(usable, samples, strict=True):
        rows[index] = replace(rows[index], milliseconds=tuple(taken))
    made.clear()
    if memory:
        base = None
        for index in usable:
            progress(f"measuring memory of {names[index]}")
            base = _peak(None, inputs, names[0], dynamic, seed) if base is None else base
            peak = _peak(names[index], inputs, names[0], dynamic, seed)
            if peak is not None and base is not None:
                rows[index] = replace(rows[index], peak_bytes=max(peak - base, 0))
    return _result(rows, args, kwargs)


def _result(rows: list[ModelRow], args: Any, kwargs: Any) -> ModelBench:
    from torchlathe.tools.bench.machine import machine

    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    batch = int(tensors[0].shape[0]) if tensors and tensors[0].dim() else 1
    texts = tuple(tensor_text(x) for x in tensors)
    return ModelBench(tuple(rows), texts, batch, torch.get_num_threads(), machine())


def _load(
    name: str, args: Any, kwargs: Any, dynamic: bool, seed: int
) -> tuple[Contestant | None, ModelRow]:
    start = time.perf_counter()
    try:
        one = contestant(name, args, kwargs, dynamic=dynamic, seed=seed)
    except ImportError as error:
        return None, ModelRow(name, problem=f"{error.name or error} is not installed")
    except Error as error:
        return None, ModelRow(name, problem=error.message)
    seconds = time.perf_counter() - start
    return one, ModelRow(name, bytes=one.bytes, parameters=one.parameters, load_seconds=seconds)


def _faithful(
    row: ModelRow, first: Contestant, one: Contestant, args: Any, kwargs: Any
) -> ModelRow:
    """The row with how far the outputs are from the first model's, by their order."""

    def flat(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> list[Any]:
            leaves = pytree.tree_leaves(run(*args, **kwargs))
            return [x for x in leaves if isinstance(x, torch.Tensor)]

        return call

    try:
        found = compare_outputs(flat(first.run), flat(one.run), [(tuple(args), dict(kwargs))])
    except Exception as error:
        return replace(row, problem=f"does not run: {type(error).__name__}: {str(error)[:200]}")
    notes = [entry.note for entry in found if entry.note]
    cosines = [entry.cosine for entry in found if entry.cosine is not None]
    errors = [entry.relative_error for entry in found if entry.relative_error is not None]
    return replace(
        row,
        cosine=min(cosines, default=None),
        relative_error=max(errors, default=None),
        problem=f"another output: {notes[0]}" if notes and not cosines else "",
    )


def interleaved(
    runs: Sequence[Callable[..., Any]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    seconds: float,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Samples of each, in milliseconds per call: one of all in each round.

    The order within a round changes from round to round, so that none always comes after the same.

    Args:
        runs: What is measured.
        args: Positional arguments of each.
        kwargs: Keyword arguments of each.
        seconds: Stop after so many, by the clock on the wall; five rounds are taken in any case.
        rounds: At most so many.
        clock: What samples are taken with; ``time.process_time`` where other programs run too.
    """
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in leaves)

    def sample(run: Callable[..., Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        return (clock() - start) / calls

    samples: list[list[float]] = [[] for _ in runs]
    with torch.inference_mode():
        for run in runs:
            sample(run, 2)
        calls = [_calls(sample(run, 1)) for run in runs]
        start = time.perf_counter()
        for number in range(rounds):
            if number >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
            order = [(number + i) % len(runs) for i in range(len(runs))]
            for i in order:
                samples[i].append(sample(runs[i], calls[i]) * 1e3)
    return samples


def _calls(seconds: float) -> int:
    return max(1, min(200, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-9))))


def _peak(name: str | None, inputs: str | None, first: str, dynamic: bool, seed: int) -> int | None:
    """Peak resident bytes of a process with this model; of one that imports only, for None."""
    task = {
        "name": name,
        "first": first,
        "inputs": inputs,
        "dynamic": dynamic,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torchlathe.tools.model_bench.worker", json.dumps(task)],
            capture_output=True,
            text=True,
            timeout=_WORKER_SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
    except subprocess.TimeoutExpired:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith("peak ")]
    return int(lines[-1].split()[1]) if done.returncode == 0 and lines else None
