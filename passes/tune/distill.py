"""`Distill`: train the program to do what a teacher does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.passes.base import Diagnostic, PassContext, PassResult
from torchlathe.passes.statistics.running import flat_batches
from torchlathe.passes.tune.distilling.attending import AttentionSite, paired_sites
from torchlathe.passes.tune.distilling.heads import ends_of_blocks, with_heads
from torchlathe.passes.tune.distilling.images import StructuralSimilarity
from torchlathe.passes.tune.distilling.layered import ROTATIONS, turned
from torchlathe.passes.tune.distilling.learning_teacher import LearningTeacher
from torchlathe.passes.tune.distilling.objective import (
    DistillingObjective,
    LogitLoss,
    ValueLoss,
)
from torchlathe.passes.tune.distilling.regularising import BiasLoss
from torchlathe.passes.tune.distilling.teachers import TeacherMixture, Teachers, as_teachers
from torchlathe.passes.tune.distilling.temperatures import Temperature, TemperatureSchedule
from torchlathe.passes.tune.distilling.values import Anchors
from torchlathe.passes.tune.healing.alignment import aligned_blocks, logits_among
from torchlathe.passes.tune.healing.objective import Outputs, output_names
from torchlathe.passes.tune.training import (
    Forward,
    Trainer,
    TrainerPass,
    TrainingOptions,
    TrainingResult,
    store,
)

__all__ = ["Distill"]

Teacher = Program | nn.Module

_NOT_NEGATIVE = (
    "hidden",
    "entropy",
    "heads",
    "head_weight",
    "condition",
    "attention_maps",
    "anchors",
    "anchor_weight",
    "bias",
    "teacher_lr",
    "teacher_weight",
)


@dataclass(frozen=True)
class Distill(TrainerPass):
    """Train the program by what one teacher or several say about the calibration batches.

    The teacher is the program that the pipeline was given, unless others are named. The loss is
    ``(1 - alpha) task + alpha distillation``, the task being the loss given to ``compile()``, and
    what else has a weight.

    Keeps: as `Heal`.
    Source: arXiv 1503.02531 (knowledge distillation), BD-KD, LSSKD, HPM-KD; see the classes in
    ``torchlathe.passes.tune.distilling`` for each. Other than in HPM-KD (arXiv 2512.09886), the
    divergence is multiplied by T^2, so that ``alpha`` means about the same at each temperature; and
    sizes in a ``chain`` are what its pipelines make them, and not those of a geometric series,
    ``|teacher| (|student| / |teacher|)^(i / L)``.
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
    data_range: float = field(
        default=1.0, metadata={"help": "of ms-ssim: largest less least value that images can have"}
    )
    scales: int = field(
        default=0,
        metadata={"help": "of ms-ssim: 1 to 5; 0 for as many as the images have room for"},
    )
    outputs: Outputs = field(
        default="auto", metadata={"help": "whether outputs are logits or other values"}
    )
    teacher_lr: float = field(
        default=0.0,
        metadata={"help": "highest learning rate of a teacher that trains along; 0 for none such"},
    )
    teacher_weight: float = field(
        default=1.0, metadata={"help": "how much such a teacher keeps to its student"}
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
    rotations: bool = field(
        default=False, metadata={"help": "heads learn pairs of a class and a rotation of the image"}
    )
    condition: float = field(
        default=0.0, metadata={"help": "weight of the condition numbers of weights"}
    )
    attention_maps: float = field(
        default=0.0, metadata={"help": "weight of what queries attend to, layer by layer"}
    )
    anchors: int = field(
        default=0, metadata={"help": "centres of the teacher's embeddings to be near to as it is"}
    )
    anchor_weight: float = field(default=1.0, metadata={"help": "weight of the term of anchors"})
    bias: float = field(
        default=0.0, metadata={"help": "how much more samples of varied features count"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of range, or a pipeline of the chain cannot be read.
        """
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise OptionError(f"alpha is {self.alpha}, but must be in [0, 1]")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not self.delta >= 1:
            raise OptionError(f"delta is {self.delta}, but must be at least 1")
        if self.rotations and not self.heads:
            raise OptionError("rotations are for auxiliary heads to tell", hint="heads=2")
        self.degrees()
        self.similarity()
        teachers = as_teachers(self.teacher)
        if self.attention and len(teachers) < 2:
            raise OptionError("attention is between teachers, and there is one", hint="teacher=[…]")
        if self.teacher_lr and (len(teachers) > 1 or self.hidden or self.attention_maps):
            raise OptionError(
                "a teacher that trains along is one, and teaches by its outputs",
                hint="teacher_lr=0, or neither several teachers nor hidden nor attention_maps",
            )
        from torchlathe.passes.spec import parse_pipeline

        for text in self.chain:
            parse_pipeline(text)

    def degrees(self) -> Temperature:
        """The temperature over time."""
        return Temperature(
            self.temperature, self.temperature_least, self.temperature_schedule, self.steps
        )

    def similarity(self) -> StructuralSimilarity:
        """The loss of images by ``values=ms-ssim``."""
        return StructuralSimilarity(self.data_range, self.scales or None)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse to begin without data.

        Raises:
            PreconditionError: No calibration data, or no loss for a teacher that learns too.
        """
        ctx.need("calibration", "it learns from the teacher's outputs on them")
        if self.teacher_lr and ctx.loss is None:
            raise PreconditionError(
                "a teacher that trains along learns by the loss, and there is none", hint="loss="
            )

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
        student, heads = program, 0
        if self.rotations:
            _check_batch(program)
        if self.heads:
            classes = _classes(program, logits) * (ROTATIONS if self.rotations else 1)
            headed = with_heads(program, classes, self.heads, seed=ctx.seed, deepest=self.rotations)
            student, heads = headed.program, headed.heads
        objective = self._objective(program, teachers, ctx, logits, heads)
        trainer = self._trainer(student, program, ctx, objective)
        if self.anchors:
            data = replace(ctx, calibration=trainer.batches.training_batches())
            objective.anchors = self._anchors(program, teachers[0], logits, data)
        if self.condition:
            objective.weights = lambda: {
                name: value for name, value in trainer.parameters.items() if value.dim() > 1
            }
        result = trainer.run()
        kept = {name: value for name, value in result.tensors.items() if name in program.entries}
        return replace(result, tensors=kept)

    def _objective(
        self,
        program: Program,
        teachers: Sequence[Teacher],
        ctx: PassContext,
        logits: Sequence[bool],
        heads: int,
    ) -> DistillingObjective:
        """The loss, whose ``weights`` and ``anchors`` are not known yet."""
        pairs, maps = self._inside(program, teachers[0])
        taps = [name for _, site in maps for name in site.taps]
        return DistillingObjective(
            program,
            ctx,
            self._asked(program, teachers, [*(theirs for _, theirs in pairs), *taps]),
            logits,
            1.0 if ctx.loss is None else self.alpha,
            self.degrees(),
            logit_loss=self.loss,
            delta=self.delta,
            value_loss=self.values,
            similarity=self.similarity(),
            hidden=self.hidden,
            pairs=pairs,
            mixture=self._mixture(len(teachers), program, logits, ctx.seed),
            condition=self.condition,
            heads=heads,
            head_weight=self.head_weight,
            rotations=self.rotations,
            maps=maps,
            map_weight=self.attention_maps,
            anchor_weight=self.anchor_weight,
            features=self._features(program) if self.bias else None,
            bias=BiasLoss(beta=self.bias),
        )

    def _asked(
        self, program: Program, teachers: Sequence[Teacher], taps: Sequence[str]
    ) -> Teachers:
        """The teachers, of whom one may train along."""
        learning = None
        if self.teacher_lr:
            learning = LearningTeacher(
                teachers[0], program, rate=self.teacher_lr, weight=self.teacher_weight
            )
        return Teachers(program, teachers, taps, learning)

    def _inside(
        self, program: Program, teacher: Teacher
    ) -> tuple[list[tuple[str, str]], list[tuple[AttentionSite, AttentionSite]]]:
        """Nodes of the student and the teacher whose values are to agree: blocks, and attention.

        Raises:
            PreconditionError: Attention is to be matched, and the teacher is a module.
        """
        if not isinstance(teacher, Program):
            if self.attention_maps:
                raise PreconditionError(
                    "attention_maps looks inside of the teacher, which has to be a Program for it",
                    hint="teacher=torchlathe.capture(model, ...)",
                )
            return [], []
        pairs = list(aligned_blocks(teacher, program).values()) if self.hidden else []
        return pairs, paired_sites(program, teacher) if self.attention_maps else []

    def _anchors(
        self, program: Program, teacher: Teacher, logits: Sequence[bool], ctx: PassContext
    ) -> Anchors:
        """Centres of the teacher's embeddings of the batches of ``ctx``.

        Raises:
            PreconditionError: No output is embeddings, (batch, features).
        """
        nodes: Any = program.output_node.args[0]
        places = [
            i
            for i, (node, is_logits) in enumerate(zip(nodes, logits, strict=True))
            if not is_logits and node.meta["val"].dim() == 2
        ]
        if not places:
            raise PreconditionError(
                "anchors are of embeddings (batch, features), and no output is such",
                hint="outputs=values if one is after all",
            )
        asked = Teachers(program, [teacher])
        found = [
            asked(Forward(batch, flat, None, nodes, {}, 0, False))[0][0][places[0]].float()
            for batch, flat in flat_batches(program, ctx)
        ]
        return Anchors(Anchors.of(torch.cat(found), self.anchors, seed=ctx.seed))

    @staticmethod
    def _features(program: Program) -> str:
        """The end of the last block, which the classifier reads.

        Raises:
            PreconditionError: There are no blocks.
        """
        ends = ends_of_blocks(program, 0, deepest=True)
        if not ends:
            raise PreconditionError(
                "bias weighs samples by the features at the end of the last block, and there is "
                "none",
                hint="blocks are modules with numbers in their paths, as layers.3; bias=0",
            )
        return ends[-1].name

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
        mixture, learning = objective.mixture, objective.teachers.learning

        def optimizer(
            parameters: Mapping[str, nn.Parameter], options: TrainingOptions
        ) -> torch.optim.Optimizer:
            groups = trainer.processes.groups(parameters)
            if mixture is not None:
                groups.append({"params": mixture.parameters()})
            if learning is not None:
                groups.append(learning.group())
            return options.make_optimizer(groups)

        key = self.key(teacher=None, attention=False)
        trainer = Trainer(
            student,
            ctx,
            chosen,
            objective=objective,
            metrics=objective.metrics,
            optimizer=optimizer,
            hooks=[*objective.hooks, *self.hooks_for(program)],
            taps=_taps(objective),
            expand=turned if self.rotations else None,
            key=f"{key} {self.attention} {objective.teachers.key()}",
        )
        return trainer


def _check_batch(program: Program) -> None:
    """Refuse a number of samples that is part of the program.

    Raises:
        PreconditionError: It is.
    """
    if any(
        isinstance(node.meta["val"].shape[0], int) for node in program.input_nodes if _axes(node)
    ):
        raise PreconditionError(
            "rotations make batches four times as large, and the program takes only batches of "
            "one size",
            hint='capture it with dynamic_shapes="auto"',
        )


def _axes(node: Any) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _taps(objective: DistillingObjective) -> list[str]:
    """Names of the nodes of the student that the objective looks at."""
    names = [mine for mine, _ in objective.pairs]
    names += [name for site, _ in objective.maps for name in site.taps]
    names += [objective.features] if objective.features is not None else []
    return list(dict.fromkeys(names))


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
    if result.stopped:
        found["stopped"] = result.stopped
    return found
