"""The pass manager: runs passes in order, and holds each to what it declares."""

from __future__ import annotations

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch import fx

from torchlathe.ir import (
    Analysis,
    Error,
    InputError,
    OptionError,
    PassError,
    PreconditionError,
    Program,
    VerifyError,
    describe,
)
from torchlathe.ir.cost import ProgramCost
from torchlathe.ir.inputs import same_input_types
from torchlathe.ir.verifying import LastOutputs, Level, cannot_run, check_equivalence, verify
from torchlathe.passes.base import (
    AnalysisPass,
    DataAnalysis,
    Exactness,
    Pass,
    PassContext,
    PassRecord,
    PassResult,
    RewritePass,
)
from torchlathe.passes.instruments import Instrument, PrintIR
from torchlathe.passes.options import options_of
from torchlathe.passes.ordering import check_order
from torchlathe.passes.reproducer import SaveProgram, write_reproducer
from torchlathe.passes.spec import parse_pipeline, pipeline_text

__all__ = ["PassLike", "PassManager"]

PassLike = Pass | str | type[Pass]

PRINT_IR_AFTER = "TORCHLATHE_PRINT_IR_AFTER"
REPRODUCER = "TORCHLATHE_REPRODUCER"


class PassManager:
    """A pipeline of passes.

    ``str()`` of it is the pipeline as text, and ``PassManager(str(manager)) == manager``.

    Args:
        passes: A text pipeline, or a sequence of passes, pass classes and texts.
        verify: How much to check before the first and after each changed pass: ``"fast"`` (also
            True), ``"full"`` or ``"off"`` (also False). Unless off, passes that declare
            themselves exact are compared with the program before them, and approximate ones
            have their error measured.
        instruments: Watch the run; the variable TORCHLATHE_PRINT_IR_AFTER adds a `PrintIR`.
        reproducer_dir: Folder that a failing run writes a reproducer to; by default what
            TORCHLATHE_REPRODUCER names, else none is written.
        save_program: Writes a program with its tensors to a file, for the reproducer.

    Raises:
        SpecError: A text cannot be read.
        OptionError: An option, or an element of ``passes``, is not what it should be.
    """

    def __init__(
        self,
        passes: PassLike | Sequence[PassLike] = (),
        *,
        verify: bool | Level = "fast",
        instruments: Sequence[Instrument] = (),
        reproducer_dir: str | Path | None = None,
        save_program: SaveProgram | None = None,
    ) -> None:
        if not isinstance(passes, str | Pass | type | Iterable):
            raise OptionError(
                f"passes must be text, a pass or a sequence of them, got {passes!r}",
                hint="() or an empty text for none",
            )
        given = [passes] if isinstance(passes, str | Pass | type) else list(passes)
        self.passes: tuple[Pass, ...] = tuple(item for one in given for item in _resolve(one))
        self.level = _level(verify)
        self.instruments = tuple(instruments)
        self.reproducer_dir = Path(reproducer_dir) if reproducer_dir is not None else None
        self.save_program = save_program

    def run(
        self,
        program: Program,
        *,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        seed: int = 0,
        progress: Callable[[str], object] | None = None,
    ) -> Program:
        """Run the passes on a copy of the program, which itself stays as it is.

        Args:
            program: What to start from; tensors that no pass replaces are shared with the result.
            calibration: Batches of data; an iterator is read into a list, so that more than one
                pass can use it.
            loss: ``(outputs, batch) -> scalar``.
            seed: Seeds torch before each pass; the caller's random state is left alone.
            progress: Called with a line of text about what is being done.

        Returns:
            The changed program, with one record per pass more in its ``history``.

        Raises:
            PreconditionError: The passes cannot run in this order, or need data that is not given.
            PassError: A pass failed, or broke its promise (VerifyError is the cause then).
            VerifyError: The program is not well formed to begin with.
        """
        if isinstance(calibration, Iterator):
            calibration = list(calibration)
        context = PassContext(
            program.copy(), "", calibration, loss, seed, progress, original=program
        )
        return _Run(self, context).run()

    def __str__(self) -> str:
        return pipeline_text(self.passes)

    def __repr__(self) -> str:
        return f"PassManager({str(self)!r}, verify={self.level!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassManager) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(str(self))


def _resolve(item: object) -> list[Pass]:
    if isinstance(item, str):
        return parse_pipeline(item)
    if isinstance(item, type) and issubclass(item, Pass):
        return [_instance(item)]
    if not isinstance(item, AnalysisPass | RewritePass):
        raise OptionError(
            f"expected a pass, a pass class or text, got {type(item).__name__}: {item!r}",
            hint="a pass is an AnalysisPass or a RewritePass" if isinstance(item, Pass) else None,
        )
    return [item]


def _instance(cls: type[Pass]) -> Pass:
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise OptionError(f"{cls.__name__} is abstract: it does not define {missing}")
    if missing := ", ".join(o.name for o in options_of(cls) if o.required):
        raise OptionError(
            f"{cls.__name__} needs {missing}", hint=f"give an object: {cls.__name__}(...)"
        )
    return cls()


def _data_analyses(item: Pass) -> Iterator[DataAnalysis[Any]]:
    """The pass itself, or what it requires, as far as that looks at data."""
    if isinstance(item, DataAnalysis):
        yield item
    required: tuple[type[Analysis[Any]], ...] = getattr(item, "requires", ())
    for cls in required:
        if issubclass(cls, DataAnalysis):
            yield cls()


def _level(level: bool | str) -> Level:
    if isinstance(level, bool):
        return "fast" if level else "off"
    for known in get_args(Level):
        if level == known:
            return known  # type: ignore[no-any-return]
    raise OptionError(f'verify={level!r} is not known; choose "off", "fast" or "full"')


class _Run:
    """One run of a manager: the program as it becomes, and what watches it."""

    def __init__(self, manager: PassManager, context: PassContext) -> None:
        self.manager = manager
        self.context = context  # of the pass that runs
        self.program = context.program
        self.passes = manager.passes
        self.level = manager.level
        self.instruments = list(manager.instruments)
        self.last = LastOutputs()
        if names := os.environ.get(PRINT_IR_AFTER):
            self.instruments.append(PrintIR(names))

    def run(self) -> Program:
        self._check_beforehand()
        error: BaseException | None = None
        try:
            for instrument in self.instruments:
                instrument.enter_pipeline(self.program, self.passes)
            for position, item in enumerate(self.passes, 1):
                watchers = self.instruments
                if all([w.should_run(position, item, self.program) for w in watchers]):
                    self._step(position, item)
        except BaseException as caught:
            error = caught
            raise
        finally:
            for instrument in self.instruments:
                instrument.exit_pipeline(self.program, error)
        return self.program

    def _check_beforehand(self) -> None:
        check_order(self.passes, self.program)
        for item in self.passes:
            if isinstance(item, RewritePass):
                self._new_context(item)
                item.check(self.program, self.context)
            for analysis in _data_analyses(item):
                self._new_context(item)
                analysis.check(self.program, self.context)
        verify(self.program, self.level)

    def _new_context(self, item: Pass) -> None:
        old = self.context
        self.context = PassContext(
            self.program,
            item.spec(),
            old.calibration,
            old.loss,
            old.seed,
            old.progress,
            original=old.original,
        )

    def _step(self, position: int, item: Pass) -> None:
        for instrument in self.instruments:
            instrument.before_pass(position, item, self.program)
        self._new_context(item)
        self.context.report(f"{position}/{len(self.passes)} {item}")
        before = self.program.copy()
        try:
            record = self._run_pass(item, before)
        except Exception as error:
            self.program.restore(before)
            raise self._failure(position, item, error) from error
        self.program.history.append(record)
        for instrument in self.instruments:
            instrument.after_pass(position, item, self.program, record)

    def _run_pass(self, item: Pass, before: Program) -> PassRecord:
        program, ctx = self.program, self.context
        cost = program.cost()
        tensors = _tensor_versions(before)
        peak, start = _peak_memory(), time.perf_counter()
        with _seeded(ctx.seed):
            for required in getattr(item, "requires", ()):
                ctx.analysis(required)
            cached = program.cached_analyses()
            self._check_facts(item, "needs")
            result = self._call(item)
        seconds, risen = time.perf_counter() - start, _risen(peak)
        if tensors != _tensor_versions(before):
            raise VerifyError(
                "the pass wrote into a tensor that it shares with the model it was given",
                hint="make new tensors and put them in place with Edit.set_tensor",
            )
        changed = self._hold_to_its_word(result, before)
        dropped = self._settle_analyses(item, cached) if changed else []
        exactness = result.exactness or getattr(item, "exactness", None)
        verification = None
        if changed:
            start = time.perf_counter()
            verify(program, self.level)
            self._check_facts(item, "provides")
            verification = self._compare(result, exactness, before)
            if verification is not None:
                verification["seconds"] = time.perf_counter() - start
        return PassRecord(
            spec=ctx.spec,
            seconds=seconds,
            changed=changed,
            exactness=exactness.value if exactness else "analysis",
            **_cost_fields("before", before, cost),
            **_cost_fields("after", program, program.cost()),
            statistics=dict(result.statistics),
            details=dict(result.details),
            diagnostics=[asdict(told) for told in (*ctx.diagnostics, *result.diagnostics)],
            analyses={"computed": ctx.computed, "reused": ctx.reused, "dropped": dropped},
            verification=verification,
            peak_memory=risen,
        )

    def _call(self, item: Pass) -> PassResult:
        if isinstance(item, AnalysisPass):
            return PassResult(False, {**item.statistics(self.context.analysis(item))})
        assert isinstance(item, RewritePass)  # the manager takes no others
        result: object = item.run(self.program, self.context)
        if not isinstance(result, PassResult):
            raise VerifyError(f"run() returned {type(result).__name__} instead of a PassResult")
        return result

    def _check_facts(self, item: Pass, which: str) -> None:
        """At level full, see for oneself what passes declare of each other."""
        if self.level != "full":
            return
        for fact in getattr(item, which, ()):
            if not fact.holds(self.program):
                kind = PreconditionError if which == "needs" else VerifyError
                raise kind(f'the pass {which} "{fact.name}", which does not hold')

    def _hold_to_its_word(self, result: PassResult, before: Program) -> bool:
        """Whether the program changed, if that is what the result says."""
        program = self.program
        # A pass that tries something and takes it back has edited, but changed nothing.
        edited = program.version != before.version
        if result.changed and not edited:
            raise VerifyError(
                "the pass says that it changed the program, but made no edit",
                hint="change programs through program.edit() only",
            )
        if result.changed or not (edited or self.level == "full"):
            return result.changed
        if program.fingerprint() != before.fingerprint():
            raise VerifyError("the pass changed the program, but says that it did not")
        return False

    def _settle_analyses(self, item: Pass, cached: dict[Analysis[Any], Any]) -> list[str]:
        """Keep the results that the pass preserves; the names of the others."""
        program = self.program
        fresh = program.cached_analyses()  # computed by the pass itself, after its edit
        preserves: frozenset[type] = getattr(item, "preserves", frozenset())
        old = {key: result for key, result in cached.items() if key not in fresh}
        kept = {key: result for key, result in old.items() if key.kind in preserves}
        if self.level == "full":
            for key, result in kept.items():
                if not key.same(result, key.compute(program)):
                    raise VerifyError(
                        f"the pass declares that it preserves {key.name}, but it does not",
                        hint=f"take {key.kind.__name__} out of preserves",
                    )
        program.adopt_analyses(kept)
        return [key.name for key in old if key not in kept and key.name != "cost"]

    def _compare(
        self, result: PassResult, exactness: Exactness | None, before: Program
    ) -> dict[str, Any] | None:
        """Compare the outputs with those of the program before, and judge exact passes."""
        if self.level == "off" or exactness not in (Exactness.EXACT, Exactness.APPROXIMATE):
            return None
        if reason := cannot_run(before) or _other_inputs(before, self.program):
            return {"level": self.level, "skipped": reason}
        # Where an approximate pass begins to differ is no news.
        exact = exactness is Exactness.EXACT
        found = check_equivalence(
            before, self.program, reference=result.reference, locate=exact, last=self.last
        )
        record = {"level": self.level, **asdict(found)}
        if not exact:
            return {**record, "passed": None, "tolerance": None, "detail": None}
        if not found.passed:
            raise VerifyError(
                f"the pass declares itself exact, but {found.detail} (in {found.dtype}; "
                f"tolerance {found.tolerance:g})",
                hint="if this is meant, the pass has to declare itself approximate",
            )
        return record

    def _failure(self, position: int, item: Pass, error: Exception) -> PassError:
        manager = self.manager
        after = f" after {pipeline_text(self.passes[: position - 1])}" if position > 1 else ""
        text, where, hint = str(error), _place(error), "the program is as it was before the pass"
        if isinstance(error, Error):
            text, where = error.message, error.where or where
            hint = f"{error.hint}; {hint}" if error.hint else hint
        parent = manager.reproducer_dir or os.environ.get(REPRODUCER)
        if parent:
            found = write_reproducer(
                Path(parent),
                self.program,
                self.passes,
                position,
                error,
                level=self.level,
                seed=self.context.seed,
                save_program=manager.save_program,
            )
            if found is not None:
                hint += f"; a reproducer is in {found.folder}, to see this again: {found.command}"
        return PassError(
            f"pass {position} of {len(self.passes)}, {item}, failed{after}: "
            f"{type(error).__name__}: {text}",
            where=where,
            hint=hint,
        )


# -- measuring -----------------------------------------------------------------------------------


def _other_inputs(before: Program, after: Program) -> str | None:
    """Why two programs cannot be run on the same inputs, if they cannot."""
    if same_input_types(before, after):
        return None
    return "the pass changed the type of inputs, and measures by itself what that does"


def _cost_fields(when: str, program: Program, cost: ProgramCost) -> dict[str, Any]:
    try:
        flops: float | None = float(cost.flops_at())
    except InputError:
        flops = None  # an extent that the data decides
    return {
        f"nodes_{when}": len(cost.nodes),
        f"parameters_{when}": cost.parameters,
        f"bytes_{when}": cost.bytes,
        f"flops_{when}": flops,
    }


def _tensor_versions(program: Program) -> list[int]:
    """How often each tensor was written to; a write through ``.data`` is not counted by torch."""
    tensors = (entry.tensor for entry in program.entries.values())
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _peak_memory() -> int | None:
    """Peak resident memory of the process so far, in bytes."""
    try:
        import resource
    except ImportError:  # not on this system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _risen(before: int | None) -> int | None:
    now = _peak_memory()
    return None if now is None or before is None else now - before


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of a pass depend on the seed alone, and disturb nobody else's."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _place(error: Exception) -> str | None:
    """The node that was being worked on, and the line of code, as far as the traceback tells."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("torch.") or module == __name__:
            continue
        found = f"{frame.f_code.co_filename}:{line} ({frame.f_code.co_name})"
        values = [frame.f_locals.get("node"), *frame.f_locals.values()]
        node = next((value for value in values if isinstance(value, fx.Node)), None)
        return f"{describe(node)}; {found}" if node is not None else found
    return None
