"""`Heal`: after rewrites, bring the program back to what the original computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.passes.base import Diagnostic, PassContext, PassResult
from torchlathe.passes.statistics.losses import check_loss
from torchlathe.passes.statistics.saving import state_key
from torchlathe.passes.tune.healing.layerwise import LayerFit, fit_layers
from torchlathe.passes.tune.healing.objective import BlockObjective, HealingObjective, Outputs
from torchlathe.passes.tune.training import (
    Trainer,
    TrainerPass,
    TrainingResult,
    store,
)
from torchlathe.passes.tune.training.module import choose_trainable

__all__ = ["Heal", "Method"]

Method = Literal["closed-form", "blockwise", "distil", "all"]


@dataclass(frozen=True)
class Heal(TrainerPass):
    """Tune the program until it computes what it did before the passes of the pipeline.

    The original is the program that the pipeline was given. Weights of layers are first refitted
    in closed form, each to the output that its layer has in the original; then all parameters are
    trained end to end, by distillation from the original on the calibration batches. No labels
    are needed. Part of the batches is held out, and the program ends in the best state seen on
    these, so that it is never worse there than before.

    Keeps: shapes, ties, exact zeros of weights that are partly zero, integers of quantised ones.
    Source: layer-wise least squares as in GPTQ-like methods (arXiv 2208.11580); distillation of
    outputs: arXiv 1503.02531; the order of both: own.
    """

    name: ClassVar[str] = "heal"
    method: Method = field(
        default="all", metadata={"help": "closed-form, blockwise, distil, or all: first and last"}
    )
    temperature: float = field(default=2.0, metadata={"help": "what logits are divided by"})
    hidden: float = field(
        default=0.0, metadata={"help": "weight of hidden states: the outputs of blocks"}
    )
    task: float = field(default=0.0, metadata={"help": "weight of the loss given by the user"})
    outputs: Outputs = field(
        default="auto", metadata={"help": "whether outputs are logits or other values"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of range.
        """
        super().__post_init__()
        if not self.temperature > 0:
            raise OptionError(f"temperature is {self.temperature}, but must be positive")
        for name in ("hidden", "task"):
            if getattr(self, name) < 0:
                raise OptionError(f"{name} is {getattr(self, name)}, but must not be negative")

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse to begin without data.

        Raises:
            PreconditionError: No calibration data, or no loss where one has a weight.
        """
        ctx.need("calibration", "it matches outputs of the original on them")
        if self.task:
            check_loss(program, ctx)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Heal the program."""
        original = ctx.original
        if original is None:
            raise PreconditionError(
                "heal needs the original, which only a pipeline knows",
                hint="run it by PassManager or compile(), after other passes",
            )
        if original.fingerprint() == program.fingerprint():
            told = Diagnostic("note", "nothing was changed before heal, so nothing is to be healed")
            return PassResult(False, diagnostics=[told])
        return _Healing(self, original, program, ctx).run()


class _Healing:
    """One run of the pass."""

    def __init__(
        self, options: Heal, original: Program, program: Program, ctx: PassContext
    ) -> None:
        self.options, self.ctx = options, ctx
        self.original, self.program = original, program
        self.training = options.training_options()
        self.stages: list[dict[str, Any]] = []
        self.fits: list[LayerFit] = []
        self.results: dict[str, TrainingResult] = {}

    def run(self) -> PassResult:
        version = self.program.version
        method = self.options.method
        self._measure("before")
        if method in ("closed-form", "all"):
            self._fit()
        if method == "blockwise":
            self._train("blockwise")
        if method in ("distil", "all"):
            self._train("distil")
        changed = self.program.version != version
        return PassResult(changed, self._statistics(), details=self._details())

    # -- stages --------------------------------------------------------------------------------

    def _trainer(self, kind: str) -> Trainer:
        options, objective = self.options, self._objective()
        blocks = BlockObjective(self.original, self.program) if kind == "blockwise" else None
        if blocks is not None and not blocks.taps:
            raise PreconditionError(
                "no block of the program matches one of the original",
                hint="method=distil needs none",
            )
        return Trainer(
            self.program,
            self.ctx,
            self.training,
            objective=objective if blocks is None else blocks,
            metrics=objective.metrics if blocks is None else None,
            hooks=options.hooks_for(self.program),
            taps=objective.taps if blocks is None else blocks.taps,
            local=blocks is not None,
            key=f"{kind} {options.key()} {state_key(self.original, ())}",
        )

    def _objective(self) -> HealingObjective:
        given = self.options
        return HealingObjective(
            self.original,
            self.program,
            self.ctx,
            temperature=given.temperature,
            hidden=given.hidden,
            task=given.task,
            outputs=given.outputs,
        )

    def _measure(self, stage: str) -> dict[str, float]:
        """Loss and fidelity on the batches held out."""
        with torch.inference_mode(False):
            found = self._trainer("distil").evaluate()
        self.stages.append({"stage": stage, **found})
        self.ctx.report(f"{stage}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        return found

    def _fit(self) -> None:
        program, options = self.program, self.options
        before, now = program.copy(), self.stages[-1]
        trainer = self._trainer("distil")
        ctx = replace(self.ctx, calibration=trainer.batches.training_batches())
        names = choose_trainable(program, options.trainable, options.frozen)
        with program.edit(by=self.ctx.spec) as edit:
            self.fits = fit_layers(self.original, program, edit, ctx, trainable=names)
        found = self._measure("closed-form")
        if not found["loss"] <= now["loss"]:
            # Each layer is nearer to its own; that all are together further off is rare.
            program.restore(before)
            self.stages[-1]["stage"] = "closed-form (taken back)"
            self.fits = []
            message = "layers fitted in closed form made the outputs worse, and were taken back"
            self.ctx.tell(Diagnostic("note", message))

    def _train(self, kind: str) -> None:
        trainer = self._trainer(kind)
        result = trainer.run()
        self.results[kind] = result
        before = self.program.copy()
        store(self.program, result.tensors, self.ctx.spec)
        now = self.stages[-1]
        found = self._measure(kind)
        if not found["loss"] <= now["loss"]:
            self.program.restore(before)
            self.stages[-1]["stage"] = f"{kind} (taken back)"

    # -- reporting -----------------------------------------------------------------------------

    def _statistics(self) -> dict[str, int | float | str]:
        kept = [stage for stage in self.stages if "taken back" not in stage["stage"]]
        first, last = kept[0], kept[-1]
        found: dict[str, int | float | str] = {
            "layers_fitted": sum(fit.after < fit.before for fit in self.fits),
            "steps": sum(result.steps for result in self.results.values()),
        }
        for name in first:
            if name != "stage":
                found[f"{name}_before"], found[f"{name}_after"] = first[name], last[name]
        for result in self.results.values():
            if result.stopped:
                found["stopped"] = result.stopped
        return found

    def _details(self) -> dict[str, Any]:
        details: dict[str, Any] = {"stages": self.stages}
        details["layers"] = [vars(fit) for fit in self.fits]
        found: dict[str, Any] = {"healing": details}
        curves: Mapping[str, TrainingResult] = self.results
        if curves:
            found["training"] = {kind: result.to_dict() for kind, result in curves.items()}
        return found
