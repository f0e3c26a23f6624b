"""`SparseTrain`: train a program until whole groups of it are exactly zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from torchlathe.ir import InputError, OptionError, PreconditionError, Program
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.analysis.segments import Segments
from torchlathe.passes.base import Diagnostic, PassContext, PassResult
from torchlathe.passes.options import did_you_mean
from torchlathe.passes.rewrite.branches.leave_out import zeroed_by
from torchlathe.passes.rewrite.erasing.choosing import Choice
from torchlathe.passes.statistics.losses import check_loss
from torchlathe.passes.tune.adapting.lora import is_rank
from torchlathe.passes.tune.optim import DHSPG, H2SPG, HESSO, HESSOCRIC, HSPG
from torchlathe.passes.tune.optim.h2spg import removable
from torchlathe.passes.tune.optim.saliency import saliency_of
from torchlathe.passes.tune.optim.sparse_optimizer import SparseOptimizer, WrappedOptimizer
from torchlathe.passes.tune.training import (
    Forward,
    Hook,
    Trainer,
    TrainerPass,
    TrainingOptions,
    TrainingResult,
    store,
)
from torchlathe.passes.tune.training.module import choose_trainable
from torchlathe.passes.tune.training.options import optimizer_class
from torchlathe.passes.tune.training.tune_pass import OptionValue

__all__ = ["SparseTrain"]

Method = Literal["hesso", "cric", "dhspg", "hspg", "h2spg"]
_CLASSES: dict[str, Callable[..., WrappedOptimizer]] = {
    "hesso": HESSO,
    "cric": HESSOCRIC,
    "dhspg": DHSPG,
    "hspg": HSPG,
    "h2spg": H2SPG,
}
# What the pass says itself, or what only the optimizer of a user's own loop can be given.
_OWN = {
    "self", "groups", "model", "base", "params", "options", "total_steps", "saliency",
    "target_sparsity", "start_step", "pruning_steps",
}  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SparseTrain(TrainerPass):
    """Trains the program on the batches and the loss given, and makes groups zero on the way.

    ``structured-erase{zeros=true}`` then cuts them out without changing any output (after
    ``method=h2spg``, ``erase-operators{zeros=true}`` does).

    Changes: values of parameters, and running statistics. Keeps: shapes, and everything that
    ``frozen`` names, with the groups that own part of it.

    Source: the optimizers of `torchlathe.optim`.
    """

    name: ClassVar[str] = "sparse-train"
    method: Method = field(
        default="hesso", metadata={"help": "hesso, cric, dhspg, hspg, or h2spg for whole branches"}
    )
    sparsity: float = _option(0.5, "share of the groups (h2spg: of the parameters) to make zero")
    start: float = _option(0.1, "steps before pruning: a count, or a share of all if below 1")
    pruning: float = _option(0.5, "steps of pruning: a count, or a share of all if below 1")
    periods: int = _option(10, "of hesso: parts that pruning is done in")
    saliency: dict[str, float] = field(
        default_factory=dict, metadata={"help": "weights of the criteria; all alike by default"}
    )
    method_options: dict[str, OptionValue] = field(
        default_factory=dict, metadata={"help": "further arguments of the method's optimizer"}
    )
    include: tuple[str, ...] = _option((), "families to prune, by patterns; all by default")
    exclude: tuple[str, ...] = _option((), "families or tensors to leave whole, by patterns")
    # Unlike other passes that train, this one may count epochs.
    steps: int | None = _option(  # type: ignore[assignment]
        None, "steps of the optimizer; unless given, epochs count"
    )
    epochs: int = _option(10, "passes over the batches")
    lr: float = _option(1e-3, "highest learning rate")
    optimizer: str = _option("AdamW", "a class of torch.optim, as the base")
    optimizer_options: dict[str, OptionValue] = field(
        default_factory=dict, metadata={"help": "further arguments of the base"}
    )
    warmup: int = _option(0, "steps over which the learning rate rises")
    dropout: bool = _option(True, "draw dropout where the graph has it")
    decay_frozen: bool = _option(
        False, "frozen weights of a group of which some is trained go to zero with it"
    )
    patience: int = _option(
        0, "once all groups are zero, stop after so many evaluations without gain; 0 for never"
    )
    keep_best: bool = _option(True, "end with the best state in which all groups are zero")

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: One is out of range, or the method has no such option.
        """
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise OptionError(
                f"sparsity is {self.sparsity}, but must be between 0 and 1", where=self.name
            )
        if self.start < 0 or self.pruning <= 0 or self.periods < 1:
            raise OptionError(
                f"start={self.start}, pruning={self.pruning}, periods={self.periods}: the first "
                "must be at least 0, the second above 0, the third at least 1",
                where=self.name,
            )
        if self.saliency:
            saliency_of(self.saliency)
        self._check_method_options()
        if self.steps is not None:
            self._schedule(self.steps)

    def _check_method_options(self) -> None:
        import inspect

        cls = _CLASSES[self.method]
        own = {**inspect.signature(cls).parameters}
        if self.method != "h2spg":
            own |= inspect.signature(SparseOptimizer).parameters
        known = sorted(own.keys() - _OWN - {f.name for f in fields(self)})
        for name in self.method_options:
            if name not in known:
                raise OptionError(
                    f"{self.method} has no option {name}",
                    where=f"{self.name} method_options",
                    hint=did_you_mean(name, known),
                )

    def _schedule(self, total: int) -> tuple[int, int]:
        """Steps before pruning, and of pruning.

        Raises:
            OptionError: They do not fit into the training.
        """

        def count(value: float) -> int:
            return int(value) if value >= 1 else int(value * total)

        start, pruning = count(self.start), max(1, count(self.pruning))
        if start + pruning > total:
            raise OptionError(
                f"pruning ends after step {start + pruning}, but the training has {total} steps",
                where=self.name,
                hint="a smaller start or pruning, or more steps",
            )
        return start, pruning

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse to begin without data and a loss.

        Raises:
            PreconditionError: One is missing.
        """
        ctx.need("calibration", "it trains on them")
        check_loss(program, ctx)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Train."""
        return _Training(self, program, ctx).run()


class _Follow(Hook):
    """Tells the optimizer the loss, and the user the sparsity."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.finished = False
        self.optimizer: Any = None

    def begin(self, trainer: Trainer) -> None:
        """Know the optimizer."""
        self.optimizer = trainer.optimizer

    def before_step(self, trainer: Trainer) -> None:
        """The mean loss of the batches of the step."""
        self.optimizer.given_loss = float(torch.stack(self.losses).mean())
        self.losses.clear()

    def after_step(self, trainer: Trainer) -> None:
        """Evaluations of before all groups were zero do not count for the best state."""
        if not self.finished:
            trainer.forget_best()
            self.finished = self.optimizer.finished

    def state(self) -> dict[str, Any]:
        """Whether all groups are zero."""
        return {"finished": self.finished}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave."""
        self.finished = bool(state["finished"])

    def describe(self) -> str:
        """How many groups are zero."""
        if isinstance(self.optimizer, SparseOptimizer):
            return f"{self.optimizer.zero_groups} of {self.optimizer.target} groups zero"
        if isinstance(self.optimizer, H2SPG) and self.optimizer.chosen:
            what = "zero" if self.finished else "leaving"
            return f"{len(self.optimizer.chosen)} branches {what}"
        return ""

    def record(self) -> dict[str, float]:
        """The share of the groups that is zero."""
        if isinstance(self.optimizer, SparseOptimizer):
            return {"group_sparsity": self.optimizer.group_sparsity}
        return {}


class _Training:
    """One run of the pass."""

    def __init__(self, options: SparseTrain, program: Program, ctx: PassContext) -> None:
        self.options, self.program, self.ctx = options, program, ctx
        self.follow = _Follow()
        self.diagnostics: list[Diagnostic] = []

    def run(self) -> PassResult:
        options, program = self.options, self.program
        self.left = self._untouched()
        self.trainer = Trainer(
            program,
            self.ctx,
            options.training_options(),
            objective=self._objective,
            optimizer=self._optimizer,
            hooks=[self.follow, *options.hooks_for(program)],
            written=self._frozen(self.left),
            key=options.key(),
        )
        self.start, self.pruning = options._schedule(self.trainer.total)
        result = self.trainer.run()
        optimizer = self.trainer.optimizer
        if not getattr(optimizer, "finished", False):
            raise InputError(
                f"training ended at step {result.steps}, before all groups were zero",
                hint="a smaller lr if it diverged; for cric, more steps or fewer max_cycles",
            )
        changed = store(program, result.tensors, self.ctx.spec)
        statistics, details = self._statistics(result, optimizer), self._details(result, optimizer)
        return PassResult(bool(changed), statistics, self.diagnostics, details=details)

    def _objective(self, forward: Forward) -> torch.Tensor:
        assert self.ctx.loss is not None
        loss = self.ctx.loss(forward.outputs, forward.batch)
        if forward.training and isinstance(loss, torch.Tensor) and loss.numel() == 1:
            self.follow.losses.append(loss.detach().float().reshape(()))
        return loss

    def _optimizer(
        self, parameters: Mapping[str, torch.nn.Parameter], training: TrainingOptions
    ) -> torch.optim.Optimizer:
        options = self.options
        more: dict[str, Any] = dict(options.method_options)
        groups: Any
        if options.method == "h2spg":
            groups = self.ctx.analysis(Segments)
            more["exclude"] = (*options.exclude, *self.left)
        else:
            groups = self.ctx.analysis(ZeroInvariantGroups)
            more |= {"include": options.include, "exclude": (*options.exclude, *self.left)}
        if options.method == "hesso":
            more["periods"] = min(options.periods, self.pruning)
        found = _CLASSES[options.method](
            groups,
            self.trainer.module.tensors(),
            base=optimizer_class(training.optimizer),
            params=self.trainer.processes.groups(parameters),
            target_sparsity=options.sparsity,
            start_step=self.start,
            pruning_steps=self.pruning,
            total_steps=self.trainer.total,
            saliency=options.saliency or "default",
            **more,
            lr=training.lr,
            **training.optimizer_options,
        )
        self.diagnostics += getattr(found, "diagnostics", [])
        return found

    def _untouched(self) -> tuple[str, ...]:
        """Families that are left whole since some of them is not trained.

        Raises:
            PreconditionError: All of them are.
        """
        options = self.options
        whole = self._prunable
        left = []
        for owner, names in whole.items():
            still = [name for name in names if name not in self._trained]
            if all(map(is_rank, names)):
                left.append(owner)
                continue
            if still and not (options.decay_frozen and len(still) < len(names)):
                left.append(owner)
                told = f"left whole, since {still[0]} is not trained"
                self.diagnostics.append(Diagnostic("note", told, name=owner))
        if whole and len(left) == len(whole):
            what = "branch" if options.method == "h2spg" else "family"
            raise PreconditionError(f"no {what} is left that could become zero, as all are frozen")
        return tuple(left)

    @cached_property
    def _trained(self) -> set[str]:
        return set(choose_trainable(self.program, self.options.trainable, self.options.frozen))

    @cached_property
    def _prunable(self) -> dict[str, list[str]]:
        """Families with groups, or branches that may go, and the tensors that they take to zero."""
        options = self.options
        if options.method == "h2spg":
            return {
                branch.name: list(zeroed_by(self.program, [branch]).slices)
                for branch in removable(self.ctx.analysis(Segments), options.exclude)
            }
        groups = self.ctx.analysis(ZeroInvariantGroups)
        choice = Choice(options.include, options.exclude)
        choice.check(groups, options.name)
        return {
            family.name: [part.name for part in family.zeroed or family.writers]
            for family in groups.prunable
        }

    def _frozen(self, left: tuple[str, ...]) -> list[str]:
        """Tensors that are not trained, and that groups or branches take to zero."""
        options = self.options
        if not options.decay_frozen:
            return []
        whole = self._prunable
        if options.method != "h2spg":
            choice = Choice(options.include, (*options.exclude, *left))
            chosen, _ = choice.of(self.ctx.analysis(ZeroInvariantGroups))
            whole = {family.name: whole[family.name] for family in chosen}
        taken = (name for owner, names in whole.items() if owner not in left for name in names)
        return [name for name in dict.fromkeys(taken) if name not in self._trained]

    def _statistics(
        self, result: TrainingResult, optimizer: torch.optim.Optimizer
    ) -> dict[str, int | float | str]:
        found: dict[str, int | float | str] = {"steps": result.steps}
        if isinstance(optimizer, SparseOptimizer):
            found["groups"] = optimizer.table.count
            found["zero_groups"] = optimizer.zero_groups
        elif isinstance(optimizer, H2SPG):
            found["zero_branches"] = len(optimizer.chosen)
        if result.evaluations:
            last = result.best if self.options.keep_best and result.best else result.evaluations[-1]
            found["loss_before"], found["loss_after"] = result.evaluations[0]["loss"], last["loss"]
        if result.stopped:
            found["stopped"] = result.stopped
        return found

    def _details(self, result: TrainingResult, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        details: dict[str, Any] = {"training": {self.options.name: result.to_dict()}}
        if isinstance(optimizer, SparseOptimizer):
            units = optimizer.zero_units()
            details["zero_groups"] = [
                {"family": f.name, "units": f.extent, "zero": len(units.get(f.name, ()))}
                for f in optimizer.table.chosen
            ]
        elif isinstance(optimizer, H2SPG):
            details["zero_branches"] = list(optimizer.chosen)
        return details
