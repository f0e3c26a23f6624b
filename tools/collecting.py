"""Making a `Report` of a program before and after its passes."""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from torchlathe._version import __version__
from torchlathe.ir import InputError, Program
from torchlathe.ir.inputs import input_paths, same_input_types
from torchlathe.tools.fidelity import OutputFidelity, compare_outputs
from torchlathe.tools.latency import Latency, compare_latency, tensor_text
from torchlathe.tools.report import FamilyRow, ParameterRow, PinRow, Report, Totals

__all__ = [
    "collect_report",
    "family_rows",
    "input_texts",
    "pin_rows",
    "program_families",
    "program_totals",
    "record_dict",
]

_MOST_BATCHES = 8  # of the calibration data that outputs are compared on

log = logging.getLogger("torchlathe")


def collect_report(
    before: Program,
    after: Program,
    *,
    original: Callable[..., Any] | None = None,
    compiled: Callable[..., Any] | None = None,
    calibration: Iterable[Any] | None = None,
    pipeline: str = "",
    backend: str = "eager",
    latency_seconds: float = 2.0,
    stages: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    agreement: Any = None,
    candidates: Sequence[Any] = (),
) -> Report:
    """Measure and describe what passes did.

    Args:
        before: The program as captured.
        after: The program after the passes, with its history; what it has beyond that of
            ``before`` is reported.
        original: The model before, called with the example inputs; None leaves out what needs it.
        compiled: The model after; None leaves out what needs it.
        calibration: The outputs are compared on the first batches of these, read as
            `torchlathe.passes.PassContext` reads them; by default on the example inputs.
        pipeline: Text form of the passes.
        backend: What runs the result.
        latency_seconds: Time to spend on measuring latency; 0 does not measure it.
        stages: Seconds by stage so far; the whole is their sum.
        notes: Kept as they are.
        agreement: How far what the backend made is from the eager program.
        candidates: What ``backend="auto"`` found of each.
    """
    latency: Latency | None = None
    fidelity: list[OutputFidelity] = []
    inputs_are = ""
    measure = original is not None and compiled is not None
    start = time.perf_counter()
    if original is not None and compiled is not None:
        batches, inputs_are, left_out = _batches(before, calibration)
        stored = not same_input_types(before, after)
        fidelity = compare_outputs(
            original, _on_stored_inputs(compiled, after) if stored else compiled, batches
        )
        notes = [*notes, *left_out]
        if stored:
            notes.append("latency is not compared: the two take inputs of other types")
        elif latency_seconds > 0:
            args, kwargs = before.example_inputs
            latency = compare_latency(
                original, compiled, args, kwargs, budget_seconds=latency_seconds
            )
    families = program_families(before)
    stages = dict(stages or {})
    if measure:
        stages["measure"] = time.perf_counter() - start
    return Report(
        model=before.model_name,
        pipeline=pipeline,
        before=program_totals(before),
        after=program_totals(after),
        backend=backend,
        passes=tuple(record_dict(record) for record in after.history[len(before.history) :]),
        latency=latency,
        fidelity=tuple(fidelity),
        fidelity_inputs=inputs_are if fidelity else "",
        families=tuple(family_rows(families, before, after)),
        pins=tuple(pin_rows(families)),
        parameters=tuple(_parameter_rows(before, after)),
        dropped=tuple(before.dropped),
        inputs=tuple(input_texts(before)),
        seconds=math.fsum(stages.values()),
        stages=stages,
        versions=versions(),
        notes=tuple(notes),
        agreement=None if agreement is None else agreement.to_dict(),
        candidates=tuple(candidate.to_dict() for candidate in candidates),
    )


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "torchlathe": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def program_totals(program: Program) -> Totals:
    """Parameters, bytes, FLOPs at the example sizes, and operations of a program."""
    cost = program.cost()
    return Totals(cost.parameters, cost.bytes, _flops(program), len(cost.nodes))


def family_rows(
    families: Any, before: Program | None = None, after: Program | None = None
) -> list[FamilyRow]:
    """Each family that owns parameters, with what is left of it; largest first.

    Args:
        families: The result of `ZeroInvariantGroups` for the program before.
        before: The program before; None if nothing was done to it.
        after: The program after.
    """
    rows = []
    nodes = {} if before is None else before.tensor_nodes
    for family in families:
        if not (owned := family_parameters(family)):
            continue
        extent = int(family.extent)
        rows.append(
            FamilyRow(
                name=family.name,
                extent=extent,
                kept=extent
                if before is None or after is None
                else units_left(family, families, before, after, nodes),
                parameters=owned,
                exactness=str(family.exactness),
                reasons=_reasons(family),
                prunable=bool(family.prunable),
            )
        )
    return sorted(rows, key=lambda row: (-row.parameters, row.name))


def _reasons(family: Any) -> tuple[str, ...]:
    if family.prunable:
        return tuple(map(str, family.reasons))
    return tuple(str(pin.reason) for pin in family.pins) or ("no parameter writes it",)


def family_parameters(family: Any) -> int:
    """Parameters that all units of a family own together."""
    return int(family.parameters_per_unit) * int(family.extent)


def pin_rows(families: Iterable[Any]) -> list[PinRow]:
    """Pins of parameters by reason; those that hold most first."""
    held: dict[str, dict[str, int]] = {}
    places: dict[str, dict[str, None]] = {}  # ordered, each once
    for family in families:
        if not (owned := family_parameters(family)):
            continue
        for pin in family.pins:
            held.setdefault(str(pin.reason), {})[family.name] = owned
            places.setdefault(str(pin.reason), {}).update({pin.where: None} if pin.where else {})
    rows = [
        PinRow(reason, tuple(places[reason]), tuple(owned), sum(owned.values()))
        for reason, owned in held.items()
    ]
    return sorted(rows, key=lambda row: (-row.parameters, row.reason))


def record_dict(record: Any) -> dict[str, Any]:
    """A pass record as a JSON-able dict, whether it is a dataclass or a mapping."""
    if isinstance(record, Mapping):
        fields = dict(record)
    elif dataclasses.is_dataclass(record) and not isinstance(record, type):
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    else:
        fields = {"spec": str(record)}
    return {str(key): _plain(value) for key, value in fields.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return record_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        inner = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [_plain(item) for item in inner]
    return str(value)


def _batches(
    program: Program, calibration: Iterable[Any] | None
) -> tuple[list[Any], str, list[str]]:
    """Calls to compare outputs on, what they are, and notes on those that do not fit."""
    from torchlathe.passes import PassContext

    example = program.example_inputs
    if calibration is None:
        return [example], "the example inputs", []
    given = list(islice(PassContext(program, calibration=calibration).inputs(), _MOST_BATCHES))
    fitting = []
    problem = ""
    for args, kwargs in given:
        try:
            program.flatten_inputs(args, kwargs)
            fitting.append((args, kwargs))
        except InputError as error:
            problem = error.message
    notes = []
    if problem:
        count = len(given) - len(fitting)
        notes.append(
            f"{count} of {len(given)} calibration batches do not fit what was captured, so outputs "
            f"were not compared on them: {problem}"
        )
    if not fitting:
        return [example], "the example inputs", notes
    plural = "es" if len(fitting) != 1 else ""
    return fitting, f"{len(fitting)} calibration batch{plural}", notes


def units_left(
    family: Any, families: Any, before: Program, after: Program, nodes: Mapping[str, Any]
) -> int:
    """Units of a family that passes left, by the indices that they kept of its tensors.

    Args:
        family: Of the program before.
        families: All of them.
        before: The program before.
        after: The program after.
        nodes: ``before.tensor_nodes``, made once for all families.
    """
    from torchlathe.passes.rewrite.erasing.units import unit_indices

    alive = [part for part in family.slices if part.name in after.entries]
    for part in alive:
        kept = after.kept.get(part.name, {}).get(part.axis)
        if kept is not None:
            earlier = before.kept.get(part.name, {}).get(part.axis)
            stays = kept if earlier is None else torch.isin(earlier, kept).nonzero().flatten()
            term = families.axis_map.terms(nodes[part.name])[part.axis]
            owner = unit_indices(term, family.atom.number)[stays]
            return int(owner[owner >= 0].unique().numel())
    # Without any tensor left, the family went with everything that read it.
    return int(family.extent) if alive else 0


def _on_stored_inputs(compiled: Callable[..., Any], after: Program) -> Callable[..., Any]:
    """The compiled model on the inputs of the original."""
    from torchlathe.passes.rewrite.quantising.quantize_cache import stored_inputs

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = stored_inputs(after, args, kwargs)
        return compiled(*args, **kwargs)

    return call


def program_families(program: Program) -> Any:
    """The families of a program (`torchlathe.passes.ZeroInvariantGroups`)."""
    from torchlathe.passes import ZeroInvariantGroups

    return program.analysis(ZeroInvariantGroups)


def _parameter_rows(before: Program, after: Program) -> list[ParameterRow]:
    rows = []
    left = after.parameters
    for name, tensor in before.parameters.items():
        shape = tuple(tensor.shape)
        now = tuple(left[name].shape) if name in left else None
        if now != shape:
            rows.append(ParameterRow(name, shape, now))
    return rows


def input_texts(program: Program) -> list[str]:
    """``name: float32[2, 16]`` of each example input."""
    from torch.utils import _pytree as pytree

    leaves = pytree.tree_leaves((tuple(program.example_inputs[0]), dict(program.example_inputs[1])))
    return [
        f"{name}: {tensor_text(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)}"
        for name, leaf in zip(input_paths(program), leaves, strict=True)
    ]


def _flops(program: Program) -> float | None:
    """FLOPs at the sizes of the example inputs; None where an extent depends on data."""
    try:
        return float(program.cost().flops_at())
    except InputError as error:
        log.debug("no FLOPs: %s", error)
        return None
