"""`Distill`: train the program to do what a teacher does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.passes.base import Diagnostic, PassContext, PassResult
from torchlathe.passes.tune.distilling.heads import with_heads
from torchlathe.passes.tune.distilling.objective import (
    DistillingObjective,
    LogitLoss,
    ValueLoss,
)
from torchlathe.passes.tune.distilling.teachers import TeacherMixture, Teachers, as_teachers
from torchlathe.passes.tune.distilling.temperatures import Temperature, TemperatureSchedule
from torchlathe.passes.tune.healing.alignment import aligned_blocks, logits_among
from torchlathe.passes.tune.healing.objective import Outputs, output_names
from torchlathe.passes.tune.training import (
    Hook,
    KeepMasks,
    Trainer,
    TrainerPass,
    TrainingOptions,
    TrainingResult,
    masks_of_zeros,
    store,
)
from torchlathe.passes.tune.training.module import choose_trainable

__all__ = ["Distill"]

Teacher = Program | nn.Module


@dataclass(frozen=True)
class Distill(TrainerPass):
    """Train the program by what one teacher or several say about the calibration batches.

    The teacher is the program that the pipeline was given, unless others are named. The loss is
    ``(1 - alpha) task + alpha distillation``, the task being the loss given to ``compile()``, and
    what else has a weight.

    Keeps: as `Heal`.
    Source: arXiv 1503.02531 (knowledge distillation), BD-KD, LSSKD, HPM-KD; see the classes in
    ``torchlathe.passes.tune.distilling`` for each.
    """

    name: ClassVar[str] = "distill"
    lr: float = field(default=1e-3, metadata={"help": "highest learning rate"})
    dropout: bool = field(default=True, metadata={"help": "draw dropout while training"})
    teacher: Any = field(
        default=None, metadata={"help": "modules or programs (Python only); else the original"}
    )
    alpha: float = field(default=0.9, metadata={"help": "share of the distillation in the loss"})
    loss: LogitLoss = field(default="kd", metadata={"help": "between logits; balanced is BD-KD"})
    delta: float = field(default=2.0, metadata={"help": "how much BD-KD favours a divergence"})
    values: ValueLoss = field(
        default="values", metadata={"help": "between outputs that are no logits"}
    )
    outputs: Outputs = field(
        default="auto", metadata={"help": "whether outputs are logits or other values"}
    )
    temperature: float = field(default=4.0, metadata={"help": "what logits are divided by"})
    temperature_schedule: TemperatureSchedule = field(
        default="constant", metadata={"help": "whether it falls while training"}
    )
    temperature_least: float = field(default=1.0, metadata={"help": "what it falls to"})
    hidden: float = field(
        default=0.0, metadata={"help": "weight of hidden states: the outputs of blocks"}
    )
    attention: bool = field(
        default=False, metadata={"help": "learn whom of several teachers to listen to"}
    )
    entropy: float = field(
        default=0.1, metadata={"help": "reward for listening to all teachers, in nats"}
    )
    chain: tuple[str, ...] = field(
        default=(),
        metadata={"help": "pipelines that make students in between, each the next one's teacher"},
    )
    heads: int = field(default=0, metadata={"help": "auxiliary classifiers after blocks"})
    head_weight: float = field(default=0.5, metadata={"help": "weight of their losses"})
    condition: float = field(
        default=0.0, metadata={"help": "weight of the condition numbers of weights"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of range, or a pipeline of the chain cannot be read.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha is {self.alpha}, but must be in [0, 1]")
        for name in ("hidden", "entropy", "heads", "head_weight", "condition"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not self.delta >= 1:
            raise OptionError(f"delta is {self.delta}, but must be at least 1")
        self.degrees()
        teachers = as_teachers(self.teacher)
        if self.attention and len(teachers) < 2:
            raise OptionError("attention is between teachers, and there is one", hint="teacher=[…]")
        from torchlathe.passes.spec import parse_pipeline

        for text in self.chain:
            parse_pipeline(text)

    def degrees(self) -> Temperature:
        """The temperature over time."""
        return Temperature(
            self.temperature, self.temperature_least, self.temperature_schedule, self.steps
        )

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse to begin without data.

        Raises:
            PreconditionError: No calibration data.
        """
        ctx.need("calibration", "it learns from the teacher's outputs on them")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Distil into the program."""
        teachers: tuple[Teacher, ...] = as_teachers(self.teacher)
        if not teachers:
            if ctx.original is None:
                raise PreconditionError(
                    "distill needs a teacher: outside of a pipeline there is no original",
                    hint="teacher=model, or run it by PassManager or compile()",
                )
            if ctx.original.fingerprint() == program.fingerprint():
                told = "the program is its own teacher, since nothing was changed before distill"
                return PassResult(False, diagnostics=[Diagnostic("note", told)])
            teachers = (ctx.original,)
        stages: dict[str, TrainingResult] = {}
        for number, text in enumerate(self.chain, 1):
            ctx.report(f"student {number} of the chain: {text}")
            student = self._made(text, teachers, ctx)
            stages[f"student {number}"] = result = self._distil(student, teachers, ctx)
            store(student, result.tensors, ctx.spec)
            teachers = (student,)
        stages["student"] = result = self._distil(program, teachers, ctx)
        changed = store(program, result.tensors, ctx.spec)
        return PassResult(
            bool(changed),
            _statistics(result, len(self.chain)),
            details={"training": {kind: found.to_dict() for kind, found in stages.items()}},
        )

    def _made(self, text: str, teachers: Sequence[Teacher], ctx: PassContext) -> Program:
        """A student between the teacher and the program."""
        from torchlathe.passes.manager import PassManager

        start = next((one for one in teachers if isinstance(one, Program)), ctx.original)
        if start is None:
            raise PreconditionError(
                "the chain begins with a program", hint="teacher=torchlathe.capture(model, ...)"
            )
        return PassManager(text, verify="off").run(
            start, calibration=ctx.calibration, loss=ctx.loss, seed=ctx.seed, progress=ctx.progress
        )

    def _distil(
        self, program: Program, teachers: Sequence[Teacher], ctx: PassContext
    ) -> TrainingResult:
        names = output_names(program)
        logits = logits_among(program, names)
        if self.outputs != "auto":
            logits = [self.outputs == "logits"] * len(names)
        first = teachers[0]
        pairs: list[tuple[str, str]] = []
        if self.hidden and isinstance(first, Program):
            pairs = list(aligned_blocks(first, program).values())
        student, heads = program, 0
        if self.heads:
            headed = with_heads(program, _classes(program, logits), self.heads, seed=ctx.seed)
            student, heads = headed.program, headed.heads
        objective = DistillingObjective(
            program,
            ctx,
            Teachers(program, teachers, [theirs for _, theirs in pairs]),
            logits,
            1.0 if ctx.loss is None else self.alpha,
            self.degrees(),
            logit_loss=self.loss,
            delta=self.delta,
            value_loss=self.values,
            hidden=self.hidden,
            pairs=pairs,
            mixture=self._mixture(len(teachers), program, logits, ctx.seed),
            condition=self.condition,
            heads=heads,
            head_weight=self.head_weight,
        )
        trainer = self._trainer(student, program, ctx, objective)
        if self.condition:
            objective.weights = lambda: {
                name: value for name, value in trainer.parameters.items() if value.dim() > 1
            }
        result = trainer.run()
        kept = {name: value for name, value in result.tensors.items() if name in program.entries}
        return replace(result, tensors=kept)

    def _mixture(
        self, teachers: int, program: Program, logits: Sequence[bool], seed: int
    ) -> TeacherMixture | None:
        if not self.attention or teachers < 2:
            return None
        return TeacherMixture(teachers, _classes(program, logits), entropy=self.entropy, seed=seed)

    def _trainer(
        self, student: Program, program: Program, ctx: PassContext, objective: DistillingObjective
    ) -> Trainer:
        added = [name for name in student.entries if name not in program.entries]
        trainable = (*self.trainable, *added) if self.trainable else ()
        chosen = self.training_options(trainable=trainable)
        hooks: list[Hook] = list(objective.hooks)
        if self.keep_zeros:
            names = choose_trainable(program, self.trainable, self.frozen)
            hooks.append(KeepMasks(masks_of_zeros(program, names)))
        mixture = objective.mixture

        def optimizer(
            parameters: Mapping[str, nn.Parameter], options: TrainingOptions
        ) -> torch.optim.Optimizer:
            groups = trainer.processes.groups(parameters)
            if mixture is not None:
                groups.append({"params": mixture.parameters()})
            return options.make_optimizer(groups)

        plain = replace(self, checkpoint=None, save_every=1, teacher=None, attention=False)
        trainer = Trainer(
            student,
            ctx,
            chosen,
            objective=objective,
            metrics=objective.metrics,
            optimizer=optimizer,
            hooks=hooks,
            taps=[mine for mine, _ in objective.pairs],
            key=f"{plain.spec()} {self.attention} {objective.teachers.key()}",
        )
        return trainer


def _classes(program: Program, logits: Sequence[bool]) -> int:
    """Columns of the first output that is logits.

    Raises:
        PreconditionError: None is.
    """
    outputs: Any = program.output_node.args[0]
    for node, found in zip(outputs, logits, strict=True):
        if found:
            return int(node.meta["val"].shape[-1])
    raise PreconditionError(
        "auxiliary heads, and attention between teachers, are for logits, and no output is",
        hint="outputs=logits if they are after all",
    )


def _statistics(result: TrainingResult, chain: int) -> dict[str, int | float | str]:
    found: dict[str, int | float | str] = {"steps": result.steps, "chain": chain}
    best = result.best or result.evaluations[-1]
    for name, value in result.evaluations[0].items():
        if name != "step":
            found[f"{name}_before"], found[f"{name}_after"] = value, best[name]
    return found
