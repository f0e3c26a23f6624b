"""What a pass is: options, promises, and what running it gives."""

from __future__ import annotations

import enum
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import fx

from torchlathe.ir import (
    Analysis,
    OptionError,
    PreconditionError,
    Program,
    describe,
    module_path,
    source_line,
)
from torchlathe.ir.interpreting import ReplaceTensor
from torchlathe.ir.verifying import cannot_run
from torchlathe.passes.options import MismatchError, conform, did_you_mean, options_of, text_of

__all__ = [
    "AnalysisPass",
    "DataAnalysis",
    "Diagnostic",
    "Exactness",
    "Fact",
    "Pass",
    "PassContext",
    "PassRecord",
    "PassResult",
    "RewritePass",
    "TunePass",
]

R = TypeVar("R")
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Exactness(enum.Enum):
    """What a rewrite promises about the outputs of the program."""

    EXACT = "exact"  # as before, with the tensors that `PassResult.reference` gives
    APPROXIMATE = "approximate"  # near what they were; the error is measured and reported
    TRAINED = "trained"  # the pass optimises its own objective


class Fact(ABC):
    """Something that is true of a program or not, and that passes rely on or bring about."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def holds(cls, program: Program) -> bool:
        """Whether the fact is true of this program."""


class _PassType(ABCMeta):
    """Names the nearest options where Python would only say "unexpected keyword argument"."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [option.name for option in options_of(cls)]
        for name in kwargs:
            if name not in known:
                raise OptionError(
                    f"{getattr(cls, 'name', cls.__name__)} has no option {name}",
                    hint=did_you_mean(name, known),
                )
        return super().__call__(*args, **kwargs)


@dataclass(frozen=True)
class Pass(metaclass=_PassType):
    """One step of a pipeline. A subclass is a frozen dataclass whose fields are its options.

    A program given to a pass satisfies `torchlathe.ir.verifying.verify`, and so does the program
    that it leaves; in between anything goes.

    Attributes:
        name: How text pipelines and messages call the pass: lower case, with dashes.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Hold the options to their types; a subclass that checks more calls this first.

        Raises:
            OptionError: A value is not of its option's type.
        """
        for option in options_of(type(self)):
            try:
                value = conform(getattr(self, option.name), option.type)
            except MismatchError as mismatch:
                found = mismatch.value
                raise OptionError(
                    f"{option.name} of {self.name}: expected {mismatch.wanted}, "
                    f"got {found!r} of type {type(found).__name__}"
                ) from None
            object.__setattr__(self, option.name, value)

    def spec(self) -> str:
        """The pass as text: its name, and the options that are not at their defaults."""
        texts = []
        for option in options_of(type(self)):
            text = text_of(getattr(self, option.name), option.type)
            if option.required or text != option.default_text:
                texts.append(f"{option.key}={text}")
        return f"{self.name}{{{','.join(texts)}}}" if texts else self.name

    def __str__(self) -> str:
        return self.spec()


@dataclass(frozen=True)
class AnalysisPass(Pass, Analysis[R], Generic[R]):
    """An analysis that can also stand in a pipeline, where its statistics are recorded."""

    def __post_init__(self) -> None:
        """Hold the options to their types, and to being the key of a cache.

        Raises:
            OptionError: A value is not of its option's type, or cannot be hashed.
        """
        super().__post_init__()
        try:
            hash(self)
        except TypeError as error:
            raise OptionError(
                f"the options of {self.name} cannot be the key of its cached result: {error}",
                hint="use tuples instead of lists, and no dicts",
            ) from error

    def statistics(self, result: R) -> dict[str, int | float]:
        """Numbers of a result that are worth a line in the report."""
        return {}


@dataclass(frozen=True)
class DataAnalysis(AnalysisPass[R], Generic[R]):
    """An analysis that looks at data: at the calibration batches, and at the loss on them.

    It is asked for by ``ctx.analysis(...)``, or by `on` without a pass. The program keeps the
    result for the calibration and loss that it was computed with, which are told apart as objects:
    a list that is changed in place is taken for the same data.
    """

    @abstractmethod
    def compute_with(self, program: Program, ctx: PassContext) -> R:
        """Compute the result without changing anything in ``program``."""

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what is known to be impossible before any pass of a pipeline runs.

        Raises:
            Error: Of the kind that fits, for instance PreconditionError without a loss.
        """

    def compute(self, program: Program) -> R:
        """Refuse: there is no data here.

        Raises:
            PreconditionError: Always.
        """
        raise PreconditionError(
            f"{self.name} looks at data, and program.analysis() has none",
            hint=f"ask ctx.analysis() in a pass, or {type(self).__name__}(...).on(program, "
            "calibration=..., loss=...)",
        )

    def on(
        self,
        program: Program,
        *,
        calibration: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        seed: int = 0,
        progress: Callable[[str], object] | None = None,
    ) -> R:
        """The result for a program and data; from the program's cache if it has it.

        Args:
            program: What to analyse.
            calibration: Batches; an iterator is read into a list.
            loss: ``(outputs, batch) -> scalar``.
            seed: Of everything random.
            progress: Called with a line of text about what is being done.

        Raises:
            Error: What `check` refuses.
        """
        if isinstance(calibration, Iterator):
            calibration = list(calibration)
        ctx = PassContext(program, self.spec(), calibration, loss, seed, progress)
        self.check(program, ctx)
        return ctx.analysis(self)


@dataclass(frozen=True)
class _OnData(Analysis[R], Generic[R]):
    """The key under which a program keeps the result of an analysis of data."""

    analysis: DataAnalysis[R]
    data: _Data
    ctx: PassContext = field(compare=False, repr=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.analysis.name

    @property
    def kind(self) -> type[Analysis[Any]]:
        return type(self.analysis)

    def compute(self, program: Program) -> R:
        return self.analysis.compute_with(program, self.ctx)

    def same(self, a: Any, b: Any) -> bool:
        return self.analysis.same(a, b)


class _Data:
    """What an analysis looked at, told apart as objects; held, so that no other takes its place."""

    def __init__(self, calibration: object, loss: object, seed: int) -> None:
        self.calibration, self.loss, self.seed = calibration, loss, seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Data) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, int]:
        return id(self.calibration), id(self.loss), self.seed


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that changes the program, and says beforehand how.

    Attributes:
        requires: Analyses that it reads; computed before it runs.
        preserves: Analyses whose results are still right for the changed program.
        needs: Facts that must hold before it.
        provides: Facts that hold after it.
        breaks: Facts that may not hold any more after it.
        exactness: What it promises about the outputs; a result may say otherwise for its run.
    """

    requires: ClassVar[tuple[type[Analysis[Any]], ...]] = ()
    preserves: ClassVar[frozenset[type[Analysis[Any]]]] = frozenset()
    needs: ClassVar[tuple[type[Fact], ...]] = ()
    provides: ClassVar[tuple[type[Fact], ...]] = ()
    breaks: ClassVar[tuple[type[Fact], ...]] = ()
    exactness: ClassVar[Exactness] = Exactness.EXACT

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what is known to be impossible before any pass of the pipeline runs.

        Args:
            program: The program as the pipeline was given it.
            ctx: As `run` gets it.

        Raises:
            Error: Of the kind that fits, for instance PreconditionError without calibration data.
        """

    def need_values(self, program: Program) -> None:
        """Refuse a program without the values of its weights.

        Raises:
            PreconditionError: There are none.
        """
        if reason := cannot_run(program):
            raise PreconditionError(
                f"{self.name} needs the values of the weights: {reason}",
                hint="capture the model with its weights",
            )

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Change the program through ``program.edit()``, and say what was done."""


@dataclass(frozen=True)
class TunePass(RewritePass):
    """A rewrite that trains."""

    exactness: ClassVar[Exactness] = Exactness.TRAINED


@dataclass
class PassContext:
    """What a pass is given besides the program.

    Attributes:
        program: The program that the pass runs on.
        spec: Text form of the pass; ``program.edit(by=ctx.spec)`` keeps it as provenance.
        calibration: Batches of data, if the user gave any; can be iterated more than once.
        loss: ``(outputs, batch) -> scalar``, if the user gave one.
        seed: Seed of everything random. The manager seeds torch with it before each pass.
        progress: Called with one line of text about what is being done; None for silence.
        computed: Names of the analyses that `analysis` had to compute.
        reused: Names of the analyses that `analysis` found in the cache.
        diagnostics: What helpers of the pass want the user to know; see `tell`.
        original: The program that the pipeline was given, as it was; None outside of a pipeline.
            Reading and running it is fine, changing it is not.
    """

    program: Program
    spec: str = ""
    calibration: Iterable[Any] | None = None
    loss: Callable[[Any, Any], torch.Tensor] | None = None
    seed: int = 0
    progress: Callable[[str], object] | None = None
    computed: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    original: Program | None = None

    def analysis(self, wanted: Analysis[R] | type[Analysis[R]]) -> R:
        """An analysis' result for the program as it is now, from the cache where it is valid."""
        key = wanted() if isinstance(wanted, type) else wanted
        if isinstance(key, DataAnalysis):
            data = _Data(self.calibration, self.loss, self.seed)
            key = _OnData(key, data, self)
        found = self.reused if key in self.program.cached_analyses() else self.computed
        if key.name not in (*self.reused, *self.computed):
            found.append(key.name)
        return self.program.analysis(key)

    def inputs(self) -> Iterator[Inputs]:
        """``(args, kwargs)`` of each calibration batch, or the example inputs if there is none.

        A batch is one tensor, a mapping of keyword arguments, or a sequence of positional ones;
        what a sequence has beyond the positional arguments of the program (labels) is left out.
        """
        for _, args, kwargs in self.batches():
            yield args, kwargs

    def batches(self) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """Each calibration batch as it came, for the loss, with its ``args`` and ``kwargs``.

        What a mapping has beyond the keywords of the program is left out too, if none is missing.
        """
        example_args, example_kwargs = self.program.example_inputs
        if self.calibration is None:
            batch = (
                example_kwargs if not example_args else (*example_args, *example_kwargs.values())
            )
            yield batch, example_args, example_kwargs
            return
        for batch in self.calibration:
            if isinstance(batch, Mapping):
                known = batch.keys() >= example_kwargs.keys()
                names = example_kwargs if known and example_kwargs else batch
                yield batch, (), {name: batch[name] for name in names}
            elif isinstance(batch, list | tuple):
                yield batch, tuple(batch[: len(example_args)]), {}
            else:
                yield batch, (batch,), {}

    def need(self, what: Literal["calibration", "loss"], why: str) -> None:
        """Refuse to go on without data that the user has to give.

        Raises:
            PreconditionError: It was not given.
        """
        if getattr(self, what) is None:
            raise PreconditionError(
                f"{self.spec} needs {what}: {why}",
                hint=f"give {what}= to compile() or to PassManager.run()",
            )

    def tell(self, diagnostic: Diagnostic) -> None:
        """Add to the diagnostics of the pass that runs, each text once."""
        if diagnostic not in self.diagnostics:
            self.diagnostics.append(diagnostic)

    def report(self, text: str) -> None:
        """Tell the user what is being done, if anyone listens."""
        if self.progress is not None:
            self.progress(text)


@dataclass(frozen=True)
class Diagnostic:
    """Something that a pass tells the user.

    Attributes:
        severity: ``"note"`` or ``"warning"``.
        message: One sentence.
        name: The node or tensor that it is about.
        where: Module path and source line.
    """

    severity: Literal["note", "warning"]
    message: str
    name: str | None = None
    where: str | None = None

    @classmethod
    def at(
        cls, node: fx.Node, message: str, severity: Literal["note", "warning"] = "note"
    ) -> Diagnostic:
        """A diagnostic about a node."""
        places = (module_path(node), source_line(node))
        where = " at ".join(place for place in places if place)
        return cls(severity, message, node.name, where or describe(node))


@dataclass
class PassResult:
    """What running a rewrite did.

    Attributes:
        changed: Whether the program is another one now.
        statistics: Numbers worth a line in the report.
        diagnostics: What to tell the user.
        reference: Gives ``(name, tensor) -> tensor`` for the tensors of the program *before* the
            pass, such that the changed program equals it; None if it equals it as it was.
        exactness: What holds for this run, where that is not what the class says.
        details: Anything else for the report to show, by topic; of JSON types.
    """

    changed: bool
    statistics: dict[str, int | float | str] = field(default_factory=dict)
    diagnostics: list[Diagnostic] = field(default_factory=list)
    reference: ReplaceTensor | None = None
    exactness: Exactness | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class PassRecord:
    """What is kept of one pass in ``program.history``; made of JSON types only.

    Attributes:
        spec: Text form of the pass.
        seconds: Time of the pass itself, without verifying.
        changed: Whether it changed the program.
        exactness: ``"exact"``, ``"approximate"``, ``"trained"``, or ``"analysis"``.
        nodes_before: Number of calls in the graph.
        parameters_before: Number of elements of all parameters; tied ones count once.
        bytes_before: Size of all tensors of the program, in bytes.
        flops_before: FLOPs at the sizes of the example inputs; None if they are not known.
        nodes_after: As before, after the pass; likewise the other three.
        statistics: What the pass counted.
        diagnostics: What the pass told the user.
        analyses: Names of the analyses that were ``computed``, ``reused`` and ``dropped``. Only
            those asked for through `PassContext.analysis` and ``requires`` are seen.
        verification: Level, errors, tolerance, dtype, whether it passed, and the seconds that all
            checks took; None if the outputs were not compared.
        peak_memory: Bytes by which the peak resident memory of the process rose during the pass;
            0 if it stayed below an earlier peak, None where the system does not tell.
        details: What else the pass has for the report, by topic.
    """

    spec: str
    seconds: float
    changed: bool
    exactness: str
    nodes_before: int
    nodes_after: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: float | None
    flops_after: float | None
    statistics: dict[str, int | float | str] = field(default_factory=dict)
    diagnostics: list[dict[str, str | None]] = field(default_factory=list)
    analyses: dict[str, list[str]] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    peak_memory: int | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A dict that ``json.dumps`` takes."""
        return asdict(self)
