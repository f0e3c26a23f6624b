"""``torchlathe.compile``: from a module to a smaller module, with a report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchlathe.backends import CompiledModel, SavedReport, backend_text, get_backend
from torchlathe.backends import load as load_artifact
from torchlathe.ir import BackendError, InputError, Program, capture
from torchlathe.ir.capturing import eval_mode
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes import PassManager

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from torchlathe.backends import Backend
    from torchlathe.passes import Instrument
    from torchlathe.passes.manager import PassLike

__all__ = ["compile", "load"]


def compile(
    model: torch.nn.Module | ExportedProgram | Program,
    passes: PassLike | Sequence[PassLike] = (),
    example_inputs: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    backend: str | Backend = "eager",
    verify: bool | str = True,
    instruments: Sequence[Instrument] = (),
    measure_latency: bool = True,
    reproducer_dir: str | os.PathLike[str] | None = None,
    progress: bool | Callable[[str], object] = False,
    seed: int = 0,
) -> CompiledModel:
    """Capture a model, run passes on it, lower it, and report what was done.

    Args:
        model: Any module that ``torch.export`` can capture, an exported program, a Program, or
            a compiled model to go on from. It is never changed, and the result shares no tensor
            with it.
        passes: Text such as ``"structured-erase{sparsity=0.5}"``, or a sequence of passes.
        example_inputs: Positional arguments of one call; a tuple, one tensor, or a dict of
            keywords.
        example_kwargs: Keyword arguments of that call.
        dynamic_shapes: As ``torch.export.export`` takes them; ``"auto"`` marks the batch axis.
        calibration: Batches, when a pass needs data; fidelity is measured on the first of them.
        loss: ``(outputs, batch) -> scalar``, when a pass needs gradients.
        backend: A name, with options as in ``"inductor{freezing=true}"``, or a backend object;
            what it makes is held against the eager program.
        verify: ``"off"`` (False), ``"fast"`` (True) or ``"full"``; see `PassManager`.
        instruments: Watch the passes: timing, printing, dumping, stopping after one.
        measure_latency: Time the result against the original, for about two seconds.
        reproducer_dir: Where a failing pass leaves what is needed to run it again.
        progress: Show what is being done on standard error, or call this with each line.
        seed: Seeds everything that is random.

    Returns:
        A module with the calling convention and the state dict names of the original.

    Raises:
        Error: One of its subclasses; see `torchlathe.ir.errors`. Options are refused before any
            work starts.
    """
    manager = PassManager(
        passes,
        verify=verify,  # type: ignore[arg-type]  # the manager refuses unknown texts
        instruments=instruments,
        reproducer_dir=None if reproducer_dir is None else Path(reproducer_dir),
        save_program=_save_program,
    )
    get_backend(backend)
    batches = hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")
    if isinstance(calibration, str) or not (calibration is None or batches):
        raise InputError(
            f"calibration must be batches, got {type(calibration).__name__}",
            hint="a list of batches, or a data loader",
        )
    if isinstance(calibration, Iterator):
        calibration = list(calibration)
    with _progress(progress) as say:
        stages: dict[str, float] = {}
        with _stage(stages, "capture", say):
            before = _capture(model, example_inputs, example_kwargs, dynamic_shapes)
            if reason := cannot_run(before):
                raise BackendError(
                    f"{before.model_name} has no values to compile: {reason}",
                    hint="torchlathe.plan says what passes would make of it",
                )
            _check_finite(before)
        with _stage(stages, "passes", say):
            after = manager.run(before, calibration=calibration, loss=loss, seed=seed, progress=say)
            after = _fused(after, manager, get_backend(backend).name, say)
        with _stage(stages, "lower", say):
            source = model if not isinstance(model, Program) else None
            compiled = CompiledModel(
                after, backend, source=source, before=before, check=verify not in (False, "off")
            )
        say("measuring")
        compiled.report = _report(
            model, before, compiled, calibration, str(manager), measure_latency, stages
        )
    return compiled


def load(
    path: str | os.PathLike[str],
    *,
    backend: str | Backend = "eager",
    mmap: bool = False,
    check: bool = True,
) -> CompiledModel:
    """Load what ``CompiledModel.save`` wrote; nothing from the file is executed.

    Args:
        path: The file.
        backend: What to lower it to.
        mmap: Map the weights into memory, where pages are read as they are used, instead of
            reading them; the file must stay as it is while the model lives.
        check: With ``mmap``, hold the weights against their hash, which reads all of them once.

    Raises:
        ArtifactError: A file that is truncated, was changed, or is of another version.
    """
    from torchlathe.tools.report import Report

    compiled = load_artifact(path, backend=backend, mmap=mmap, check=check)
    if isinstance(compiled.report, SavedReport):
        compiled.report = Report.from_dict(compiled.report.to_dict())
    return compiled


def _capture(
    model: Any, example_inputs: Any, example_kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> Program:
    if isinstance(model, Program):
        return model
    if isinstance(model, CompiledModel):
        # Going on from the program keeps the names and indices of the first original.
        return model.program.copy()
    return capture(model, example_inputs, example_kwargs, dynamic_shapes=dynamic_shapes)


def _fused(
    program: Program, manager: PassManager, backend: str, say: Callable[[str], object]
) -> Program:
    """The program with fused ops for quantised layers, unless the pipeline chose them itself.

    Backends that write files for other machines get the program as it is.
    """
    runtime = {"eager": "eager", "inductor": "inductor", "aoti": "inductor"}.get(backend)
    stored = any(str(node.target) == "torchlathe.dequantize.default" for node in program.nodes)
    if runtime is None or not stored or any(p.name == "fuse-kernels" for p in manager.passes):
        return program
    from torchlathe.passes import FuseKernels

    fuse = FuseKernels(runtime="inductor" if runtime == "inductor" else "eager")
    return PassManager([fuse], verify=manager.level).run(program, progress=say)


def _check_finite(program: Program) -> None:
    """Refuse weights that no pass could rank or compare.

    Raises:
        InputError: NaN or infinity in parameters, by name.
    """
    bad = []
    for name, tensor in program.parameters.items():
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        # A sum needs no temporary of the tensor's size; only if it is not finite look closer.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float64)) and not bool(
            torch.isfinite(tensor.detach()).all()
        ):
            bad.append(name)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(
            f"NaN or infinity in {', '.join(bad[:5])}{more}",
            hint="load a checkpoint from before the training diverged",
        )


def _report(
    model: Any,
    before: Program,
    compiled: CompiledModel,
    calibration: Iterable[Any] | None,
    pipeline: str,
    measure_latency: bool,
    stages: dict[str, float],
) -> Any:
    from torchlathe.tools.collecting import collect_report

    with _original(model, before) as original:
        return collect_report(
            before,
            compiled.program,
            original=original,
            compiled=compiled,
            calibration=calibration,
            pipeline=pipeline,
            backend=backend_text(compiled.backend),
            latency_seconds=2.0 if measure_latency else 0.0,
            stages=stages,
            agreement=compiled.agreement,
            candidates=compiled.candidates,
        )


@contextmanager
def _original(model: Any, before: Program) -> Iterator[Callable[..., Any]]:
    """The original as something to call, in eval mode for the time being."""
    if isinstance(model, torch.nn.Module):
        with eval_mode(model):
            yield _checked(model)
    elif isinstance(model, Program):
        # Not before.run: node by node it would be slower than any model is.
        yield CompiledModel(before)
    else:
        yield model.module()


def _checked(model: torch.nn.Module) -> Callable[..., Any]:
    """The model, where export takes what it does not: its fake tensors do not compare dtypes."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return model(*args, **kwargs)
        except Exception as error:
            raise InputError(
                "the model does not run on what it is measured on: "
                f"{type(error).__name__}: {error}",
                hint="check shapes, dtypes and devices of example_inputs and calibration",
            ) from error

    return run


def _save_program(program: Program, path: Path) -> None:
    CompiledModel(program).save(path)


@contextmanager
def _stage(stages: dict[str, float], name: str, say: Callable[[str], object]) -> Iterator[None]:
    say(name)
    start = time.perf_counter()
    yield
    stages[name] = time.perf_counter() - start


@contextmanager
def _progress(wanted: bool | Callable[[str], object]) -> Iterator[Callable[[str], object]]:
    if callable(wanted):
        yield wanted
    elif not wanted:
        yield lambda _: None
    else:
        from torchlathe.tools.cli.progress import Progress

        with Progress() as progress:
            yield progress.say
