"""What torchlathe does with one model: capture, analyse, erase, run, and compare with the twin."""

from __future__ import annotations

import copy
import functools
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchlathe.ir import Program, capture
from torchlathe.passes import PassContext, PassManager, StructuredErase, ZeroInvariantGroups
from torchlathe.passes.analysis.families import Families
from torchlathe.tools.bench.coverage.entry import Entry, Inputs

__all__ = ["LONG", "TOLERANCE", "Timer", "best_of", "measure", "relative_error", "zeroed_twin"]

SPARSITY = 0.5
PIPELINE = f"structured-erase{{sparsity={SPARSITY}}}"
LONG = 4.0  # seconds, after which nothing is repeated
TOLERANCE = 1e-4  # float32, relative to the largest magnitude of an output

Report = Callable[[dict[str, Any]], None]


def measure(entry: Entry, report: Report) -> None:
    """Take one model through all stages; what is known so far is reported at each.

    Times are CPU seconds of this process, the best of three, since the machine may have other work.

    Args:
        entry: The model.
        report: Takes what to add to the row; a row cut short by a limit has what came before.
    """
    report({"outcome": "build"})
    model = entry.build()
    inputs = [entry.example(which) for which in (0, 1)]
    with torch.no_grad():
        before = [_tensors(model(*args, **kwargs)) for args, kwargs in copy.deepcopy(inputs)]
    parameters = _count(model.parameters())
    report({"outcome": "capture", "parameters": parameters})
    with Timer() as timer:
        program = _captured(entry, model, inputs[0])
    nodes = sum(node.op == "call_function" for node in program.nodes)
    report({"outcome": "analysis", "capture_s": timer.seconds, "nodes": nodes})
    # A copy has no analysis yet.
    work = program.copy()
    with Timer() as timer:
        families = work.analysis(ZeroInvariantGroups)
    report({"outcome": "erase", "analysis_s": timer.seconds, **describe(work, families)})
    seconds = best_of(lambda: _erase(program.copy()))
    after = PassManager(PIPELINE, verify="off").run(program.copy())
    unread = _unread(program, model)
    left = _count(after.parameters.values()) + unread
    report({"outcome": "run", "total_s": seconds, "parameters_after": left, "unread": unread})
    got = []
    for (args, kwargs), batch in zip(inputs, entry.batches, strict=True):
        with torch.no_grad():
            got.append(_tensors(after.run(*args, **kwargs)))
        report({"ran_at": [*entry.batches[: entry.batches.index(batch) + 1]]})
    report({"outcome": "compare"})
    report(_compare(model, program, after, inputs, before, got))


def _erase(program: Program) -> Callable[[], object]:
    """Analysis and erase of a program that has no analysis yet, to be timed."""
    context = PassContext(program, spec=PIPELINE)
    return lambda: StructuredErase(sparsity=SPARSITY).run(program, context)


def best_of(prepare: Callable[[], Callable[[], object]], rounds: int = 3) -> float:
    """Fewest CPU seconds of some rounds; one round where it takes long."""
    found: list[float] = []
    while len(found) < rounds and sum(found) < LONG:
        work = prepare()
        with Timer() as timer:
            work()
        found.append(timer.seconds)
    return min(found)


def _captured(entry: Entry, model: nn.Module, inputs: Inputs) -> Program:
    args, kwargs = inputs
    return capture(model, args, kwargs, dynamic_shapes=entry.dynamic_shapes)


def _compare(
    model: nn.Module,
    program: Program,
    after: Program,
    inputs: list[Inputs],
    before: list[list[torch.Tensor]],
    got: list[list[torch.Tensor]],
) -> dict[str, Any]:
    """Errors against the zeroed twin, and how far the zeroing moved the outputs."""
    twin = zeroed_twin(model, after)
    with torch.no_grad():
        want = [_tensors(twin(*args, **kwargs)) for args, kwargs in copy.deepcopy(inputs)]
    error = max(map(relative_error, got, want))
    row: dict[str, Any] = {
        "error_f32": error,
        "moved": max(map(relative_error, want, before)),
        "outcome": "ok" if error <= TOLERANCE else "differs",
    }
    if row["moved"] < 10 * TOLERANCE:
        row["outcome"] = "vacuous"  # a mistake would hardly show
    if not error <= TOLERANCE:
        # Where rounding grows from layer to layer, only more digits can tell it from a mistake.
        row["error_f64"] = _error_in_float64(program, after, inputs)
        row["error_f64_module"] = _error_against_module(twin, after, inputs)
        # Modules that cast to float32 themselves agree only to its digits.
        if row["error_f64"] <= 1e-9 and (row["error_f64_module"] or 0.0) <= 1e-5:
            row["outcome"] = "ok"
    return row


def _error_in_float64(program: Program, after: Program, inputs: list[Inputs]) -> float:
    def zeroed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for axis, indices in after.zeroed.get(name, {}).items():
            tensor = tensor.index_fill(axis, indices, 0)
        return tensor

    worst = 0.0
    for args, kwargs in inputs:
        with torch.no_grad():
            got = functools.partial(after.run, dtype=torch.float64)(*args, **kwargs)
            want = functools.partial(program.run, dtype=torch.float64, replace_tensor=zeroed)(
                *args, **kwargs
            )
        worst = max(worst, relative_error(_tensors(got), _tensors(want)))
    return worst


def _error_against_module(twin: nn.Module, after: Program, inputs: list[Inputs]) -> float | None:
    """The same against the module itself; None where it does not run in float64."""
    twin = copy.deepcopy(twin).double()
    worst = 0.0
    for call in inputs:
        args, kwargs = pytree.tree_map_only(torch.Tensor, _double, call)
        with torch.no_grad():
            got = after.run(*call[0], dtype=torch.float64, **call[1])
            try:
                want = twin(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError):
                return None
        worst = max(worst, relative_error(_tensors(got), _tensors(want)))
    return worst


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def zeroed_twin(model: nn.Module, after: Program) -> nn.Module:
    """A full-size copy of the module with zeros where the erased slices write.

    Made from names alone, with none of the machinery that it checks.
    """
    twin = copy.deepcopy(model)
    tensors: dict[str, torch.Tensor] = dict(twin.named_parameters(remove_duplicate=False))
    tensors.update(twin.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in after.zeroed.items():
            for axis, indices in axes.items():
                if len(indices):  # none: a bias that a fold added is not in the module
                    tensors[name].index_fill_(axis, indices, 0)
    return twin


def relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Largest absolute difference over the largest magnitude, the worst of all outputs.

    An output of another shape, or one that is not finite where it should be, is an infinite error.
    """
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        same = (a == b) | (a.isnan() & b.isnan())
        a, b = a.double().masked_fill(same, 0), b.double()
        if not bool(a.isfinite().all()):
            return float("inf")
        finite = b[b.isfinite()]
        if finite.numel():
            scale = max(float(finite.abs().max()), 1e-30)
            worst = max(worst, float((a - b.masked_fill(same, 0)).abs().max()) / scale)
    return worst


# -- what the analysis found -----------------------------------------------------------------


def describe(program: Program, families: Families) -> dict[str, Any]:
    """Counts of families, the share of the parameters on a free axis, and what pins the rest."""
    sizes = {name: tensor.numel() for name, tensor in program.parameters.items()}
    exact = [f for f in families.prunable if f.exactness != "approximate"]
    free = {s.name for f in exact for s in f.slices} & sizes.keys()
    pins: dict[str, int] = {}
    losses: dict[str, int] = {}
    for name in sizes.keys() - free:
        owners = families.of(name)
        for reason in {_pin_text(f) for f in owners if f.pinned}:
            pins[reason] = pins.get(reason, 0) + sizes[name]
        for reason in {r for f in owners if not f.pinned for r in _loss_texts(f)}:
            losses[reason] = losses.get(reason, 0) + sizes[name]
    return {
        "families": len(families),
        "prunable": len(families.prunable),
        "pinned": len(families.pinned),
        "approximate": len(families.prunable) - len(exact),
        "free_share": sum(sizes[name] for name in free) / max(1, sum(sizes.values())),
        "pins": _largest(pins),
        "losses": _largest(losses),
        "unruled": dict(families.axis_map.unruled),
    }


def _pin_text(family: Any) -> str:
    """The pin's reason without names of inputs, so that equal causes count together."""
    reason = str(family.pins[0].reason)
    return "it is an axis of an input" if reason.startswith("it is an axis of the inp") else reason


def _loss_texts(family: Any) -> list[str]:
    # What follows the reason is the place.
    return [reason.partition(": ")[0] for reason in family.reasons]


def _largest(counts: Mapping[str, int], most: int = 8) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:most])


# -- small parts -----------------------------------------------------------------------------


class Timer:
    """CPU seconds of a block, which does not pay for the garbage of what was before."""

    seconds = 0.0

    def __enter__(self) -> Self:
        gc.collect()
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self._start


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x.detach() for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def _unread(program: Program, model: nn.Module) -> int:
    """Parameters that the forward code never reads: they are not the erase's to count as gone."""
    own = dict(model.named_parameters())
    return sum(own[name].numel() for name in program.dropped if name in own)


def _count(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)
