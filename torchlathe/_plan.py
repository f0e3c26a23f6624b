"""``torchlathe.plan``: what passes would do to a model, without lowering or measuring it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchlathe._compile import _capture, _progress, _stage
from torchlathe.ir import Program
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes import PassManager

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from torchlathe.passes.manager import PassLike
    from torchlathe.tools.report import Report

__all__ = ["plan"]


def plan(
    model: torch.nn.Module | ExportedProgram | Program,
    passes: PassLike | Sequence[PassLike] = (),
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    verify: bool | str = True,
    progress: bool | Callable[[str], object] = False,
    seed: int = 0,
) -> Report:
    """Capture a model, run passes on it, and say what it would become.

    The model may be without values: built under ``torch.device("meta")``, or from fake tensors.
    Then the plan takes no memory for the weights, and what asks for values is refused: no
    criterion but ``"random"`` can rank units, and which units go says nothing, only how many.

    Args:
        model: As `torchlathe.compile` takes it; it is never changed.
        passes: Text such as ``"structured-erase{importance=random,scope=local}"``, or passes.
        example_inputs: Positional arguments of one call; a tuple, one tensor, or a dict of
            keywords. They may be on the meta device, too.
        example_kwargs: Keyword arguments of that call.
        dynamic_shapes: As ``torch.export.export`` takes them; ``"auto"`` marks the batch axis.
        calibration: Batches, when a pass needs data.
        loss: ``(outputs, batch) -> scalar``, when a pass needs gradients.
        verify: As `torchlathe.compile` takes it; without values only what can be read is checked.
        progress: Show what is being done on standard error, or call this with each line.
        seed: Seeds everything that is random.

    Returns:
        The report: units, parameters, bytes and FLOPs before and after, pins, and the new shapes;
        without latency and fidelity.

    Raises:
        Error: One of its subclasses; see `torchlathe.ir.errors`.
    """
    from torchlathe.tools.collecting import collect_report

    manager = PassManager(passes, verify=verify)  # type: ignore[arg-type]  # it refuses others
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    with _progress(progress) as say:
        stages: dict[str, float] = {}
        with _stage(stages, "capture", say):
            before = _capture(model, example_inputs, example_kwargs, dynamic_shapes)
        with _stage(stages, "passes", say):
            after = manager.run(before, calibration=calibration, loss=loss, seed=seed, progress=say)
    notes = ["a plan: nothing was lowered, saved or measured"]
    if cannot_run(before):
        notes.append("the model has no values, so which units go says nothing, only how many")
    return collect_report(
        before, after, pipeline=str(manager), backend="plan", stages=stages, notes=notes
    )
