"""The loop: batches, loss, steps, evaluation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from torchlathe.ir import InputError, PreconditionError, Program
from torchlathe.passes.base import Diagnostic, PassContext
from torchlathe.passes.statistics.running import device_of
from torchlathe.passes.statistics.saving import batch_digest, state_key
from torchlathe.passes.statistics.telling import callable_text
from torchlathe.passes.tune.training.checkpoints import Checkpoint
from torchlathe.passes.tune.training.data import Part, TrainingData
from torchlathe.passes.tune.training.hooks import Hook
from torchlathe.passes.tune.training.module import (
    TrainingModule,
    choose_trainable,
    like,
    whole,
)
from torchlathe.passes.tune.training.options import TrainingOptions
from torchlathe.passes.tune.training.processes import Processes
from torchlathe.passes.tune.training.progress import Progress, TrainingResult

__all__ = ["Forward", "MakeOptimizer", "Objective", "Trainer"]


@dataclass(frozen=True)
class Forward:
    """One batch through the program.

    Attributes:
        batch: As it came; of several processes, each has its rows.
        flat: Flat inputs of the program.
        outputs: In the structure that the model returns.
        flat_outputs: The same as a list, in order.
        taps: Values of the nodes that were asked for, by name.
        step: Steps of the optimizer so far.
        training: Whether this is for gradients; otherwise it is an evaluation.
    """

    batch: Any
    flat: Sequence[Any]
    outputs: Any
    flat_outputs: Sequence[Any]
    taps: Mapping[str, torch.Tensor]
    step: int
    training: bool


Objective = Callable[[Forward], torch.Tensor]
Metrics = Callable[[Forward], Mapping[str, float]]
MakeOptimizer = Callable[[Mapping[str, torch.nn.Parameter], TrainingOptions], torch.optim.Optimizer]


class Trainer:
    """Trains the parameters of a program by an objective on batches.

    The program and the caller's model never change: the result has what training made of the
    tensors. When ``torch.distributed`` is initialised (as under ``torchrun``, after
    ``init_process_group``), parameters, gradients and the state of the optimizer are sharded over
    all processes by FSDP2, block by block, and each process takes its rows of every batch; what
    is computed is the same.

    Args:
        program: What to train.
        ctx: Batches (``calibration``), seed, and where progress is told.
        options: How.
        objective: From `Forward` to the loss; a mean over the samples of the batch.
        metrics: From `Forward` to further numbers for evaluations; means over samples.
        validation: Batches to evaluate on, instead of some that are held out.
        optimizer: Makes the optimizer; by default the class of the options.
        hooks: Called between steps.
        taps: Names of nodes whose values the objective needs.
        local: Stop gradients between blocks, so that each learns from the taps in it alone.
        expand: From flat inputs to those that the program is given instead in training, perhaps
            of more samples; `Forward.flat` is without it.
        written: Names of tensors that hooks or the optimizer write to, besides those trained.
        key: What the objective is, for the name of the checkpoint; its code unless given.

    Attributes:
        module: The program as a module; see `TrainingModule`.
        batches: To train on, and to evaluate on.
        parameters: What is trained, by the names that the program has; DTensors if sharded.
        optimizer: Of `run`.
        step: Steps done so far.
        total: Steps to do.

    Raises:
        OptionError: A pattern that fits no parameter, or no number of steps.
        PreconditionError: Nothing to train.
    """

    def __init__(
        self,
        program: Program,
        ctx: PassContext,
        options: TrainingOptions,
        *,
        objective: Objective,
        metrics: Metrics | None = None,
        validation: Any = None,
        optimizer: MakeOptimizer | None = None,
        hooks: Sequence[Hook] = (),
        taps: Sequence[str] = (),
        local: bool = False,
        expand: Callable[[list[Any]], list[Any]] | None = None,
        written: Sequence[str] = (),
        key: str = "",
    ) -> None:
        self.program, self.ctx, self.options = program, ctx, options
        self._expand = expand
        self.objective, self.metrics, self.hooks = objective, metrics, tuple(hooks)
        self.device = device_of(program)
        self.processes = Processes(self.device)
        self.batches = self._make_batches(validation)
        self.total = self._count_steps()
        self._every = options.evaluate_every or max(1, self.total // 10)
        self._key = key
        self.module = self._make_module(taps, local, written)
        self.parameters = self.module.trainable()
        self._make = optimizer
        self._best: dict[str, torch.Tensor] = {}
        self._now = Progress()
        self._epoch_random = torch.get_rng_state()
        self._resumed_random: Mapping[str, torch.Tensor] | None = None

    def _make_batches(self, validation: Any) -> TrainingData:
        return TrainingData(
            self.program,
            self.ctx,
            held_out=self.options.held_out,
            validation=validation,
            shuffle=self.options.shuffle,
            seed=self.ctx.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )

    def _make_module(
        self, taps: Sequence[str], local: bool, written: Sequence[str]
    ) -> TrainingModule:
        options = self.options
        names = choose_trainable(self.program, options.trainable, options.frozen)
        with torch.inference_mode(False):
            module = TrainingModule(
                self.program,
                names,
                taps=taps,
                batch_norm=options.batch_norm,
                dropout=options.dropout,
                split=self.processes.world > 1,
                recompute=options.recompute,
                local=local,
                written=written,
            )
            self.processes.shard(module, module.blocks)
        return module

    @property
    def step(self) -> int:
        """Steps of the optimizer so far."""
        return self._now.step

    def _count_steps(self) -> int:
        if self.options.steps is not None:
            return self.options.steps
        count = self.batches.count()
        if count is None:
            raise PreconditionError(
                f"{self.ctx.spec}: the data does not tell how many batches it has",
                hint="give steps=",
            )
        return max(1, math.ceil(self.options.epochs * count / self.options.accumulate))

    # -- running -------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train.

        Raises:
            InputError: The data does not fit, a checkpoint cannot be written, or the loss became
                infinite or NaN and no better state was kept.
            ArtifactError: A checkpoint that cannot be read.
        """
        start = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad(), self.processes.quiet():
            self._prepare()
            resumed = self._resume()
            if not self._now.done:
                self._loop()
                self._finish()
        now = self._now
        return TrainingResult(
            {name: whole(value).clone() for name, value in self._final().items()},
            now.losses,
            now.evaluations,
            now.best,
            now.step,
            now.stopped,
            time.perf_counter() - start,
            resumed,
            now.records,
        )

    def _prepare(self) -> None:
        options = self.options
        if self._make is not None:
            self.optimizer = self._make(self.parameters, options)
        else:
            self.optimizer = options.make_optimizer(self.processes.groups(self.parameters))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: options.factor(step, self.total)
        )
        for hook in self.hooks:
            hook.begin(self)

    def _loop(self) -> None:
        now, options = self._now, self.options
        if not now.evaluations:
            self._evaluate()
        parts = self._stream()
        while now.step < self.total and not now.stopped:
            loss = self._one_step(parts)
            now.losses.append(loss)
            if not math.isfinite(loss):
                self._diverged(loss)
                break
            now.step += 1
            if self.hooks:
                now.records.append({k: v for h in self.hooks for k, v in h.record().items()})
            if now.step % self._every == 0 or now.step == self.total:
                self._evaluate()
            self._report(loss)
            if options.checkpoint and now.step % options.save_every == 0 and not now.stopped:
                self._save()

    def _one_step(self, parts: Iterator[Part]) -> float:
        """One step of the optimizer; the mean loss of its batches."""
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for _ in range(self.options.accumulate):
            part = next(parts)
            with self._autocast():
                loss = self._loss(self._forward(part, training=True))
            # Gradients of processes are averaged, whatever share of the samples each has.
            scale = part.share * self.processes.world / self.options.accumulate
            (loss * scale).backward()
            total += loss.detach().float() * part.share / self.options.accumulate
        value = float(self.processes.sum(total))
        if math.isfinite(value):
            self.processes.average_unsharded(self.parameters.values())
            for hook in self.hooks:
                hook.before_step(self)
            if self.options.clip is not None:
                self.processes.clip(self.parameters.values(), self.options.clip)
            self.optimizer.step()
            for hook in self.hooks:
                hook.after_step(self)
            self.schedule.step()
        return value

    def _forward(self, part: Part, *, training: bool) -> Forward:
        given = self._expand(part.flat) if self._expand and training else part.flat
        flat, taps = self.module(*given)
        outputs = self.program.unflatten_outputs(flat)
        return Forward(part.batch, part.flat, outputs, flat, taps, self._now.step, training)

    def _loss(self, forward: Forward) -> torch.Tensor:
        loss = self.objective(forward)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise InputError(
                f"the loss must be one number, got {shape}", hint="take its mean or sum"
            )
        if forward.training and not loss.requires_grad:
            raise InputError(
                "the loss does not depend on the parameters that are trained",
                hint="train others (trainable=), or compute the loss from the outputs",
            )
        return loss.reshape(())

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.options.amp:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            yield

    def _stream(self) -> Iterator[Part]:
        """Batches without end, from where the run is."""
        now = self._now
        while True:
            # A loader draws its order from here when it begins, so a resumed run begins it alike.
            if (state := self._resumed_random) is not None:
                torch.set_rng_state(state["epoch"])
            self._epoch_random = torch.get_rng_state()
            parts = self.batches.epoch(now.epoch, now.position)
            if state is not None:
                self._restore_random(state)
            self._resumed_random = None
            found = False
            for part in parts:
                found = True
                now.position += 1
                yield part
            if not found and not now.position:
                raise InputError(
                    "the calibration data holds no batch to train on",
                    hint="give batches that can be iterated more than once, or hold out fewer",
                )
            now.epoch, now.position = now.epoch + 1, 0

    # -- evaluating ----------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """The objective and the metrics on the batches held out, in eval mode."""
        self.module.eval()
        sums: dict[str, float] = {}
        count = 0
        with torch.no_grad():
            for part in self.batches.held():
                with self._autocast():
                    forward = self._forward(part, training=False)
                    found = {"loss": float(self._loss(forward))}
                found |= dict(self.metrics(forward)) if self.metrics else {}
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value * part.share
                count += 1
        if not count:
            raise InputError("there is no batch to evaluate on", hint="give validation= some")
        values = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        means = (self.processes.sum(values) / count).tolist()
        return dict(zip(sums, means, strict=True))

    def forget_best(self) -> None:
        """Let the next evaluation be the best so far; for hooks that change what is trained."""
        self._now.best, self._now.stale = None, 0
        self._best = {}

    def _evaluate(self) -> None:
        now = self._now
        found = {"step": now.step, **self.evaluate()}
        now.evaluations.append(found)
        if self._is_best(found["loss"]):
            now.best, now.stale = found, 0
            if self.options.keep_best:
                self._best = self._current()
        else:
            now.stale += 1
            if self.options.patience and now.stale >= self.options.patience:
                now.stopped = "early"

    def _is_best(self, loss: float) -> bool:
        """Whether an evaluation is the best so far; what was given is, whatever its loss."""
        best = self._now.best
        if best is None:
            return math.isfinite(loss) or not self._now.step
        return loss < best["loss"] or (math.isfinite(loss) and math.isnan(best["loss"]))

    def _diverged(self, loss: float) -> None:
        now = self._now
        message = f"the loss became {loss} at step {now.step + 1}, where training stopped"
        if not self.options.keep_best:
            raise InputError(message, hint="a smaller lr, or a warm-up")
        if now.best is None:
            raise _nothing_kept(message)
        now.stopped = "diverged"
        self.ctx.tell(Diagnostic("warning", f"{message}; try a smaller lr, or a warm-up"))

    def _current(self) -> dict[str, torch.Tensor]:
        return {name: self.module.tensor(name).detach().clone() for name in self.module.changing()}

    def _final(self) -> dict[str, torch.Tensor]:
        if self.options.keep_best and self._now.best is None:
            raise _nothing_kept("no loss on the batches held out was finite")
        return self._best if self.options.keep_best else self._current()

    def _report(self, loss: float) -> None:
        now = self._now
        told = [f"step {now.step} of {self.total}", f"loss {loss:.4g}"]
        told += [text for hook in self.hooks if (text := hook.describe())]
        if now.evaluations:
            last = now.evaluations[-1]
            told += [f"{k} {v:.4g}" for k, v in last.items() if k not in ("step", "loss")]
            told.append(f"held out {last['loss']:.4g}, best {(now.best or last)['loss']:.4g}")
        self.ctx.report(", ".join(told))

    # -- checkpoints ---------------------------------------------------------------------------

    def _finish(self) -> None:
        self._now.done = True
        if self.options.checkpoint:
            self._save()

    def _checkpoint(self) -> Checkpoint:
        folder = self.options.checkpoint
        assert folder is not None
        return Checkpoint(folder, self._about)

    @cached_property
    def _about(self) -> list[str]:
        """What the run is: program, options, objective, loss, seed, batches."""
        options = replace(self.options, checkpoint=None, save_every=1)
        objective = self._key or callable_text(self.objective)
        told = [repr(options), objective, callable_text(self.ctx.loss), str(self.ctx.seed)]
        return [state_key(self.program, told), self.batches.digest(batch_digest)]

    def _save(self) -> None:
        state = {
            "progress": vars(self._now),
            "module": self._current(),
            "best": self._best,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"},
            "hooks": {_name(hook): state for hook in self.hooks if (state := hook.state())},
            "random": self._random_state(),
        }
        self.processes.save(self._checkpoint(), state)

    def _random_state(self) -> dict[str, Any]:
        state = {"cpu": torch.get_rng_state(), "epoch": self._epoch_random}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _resume(self) -> int:
        """Go on from a checkpoint, if there is one; the step it is of."""
        state = self._checkpoint().load() if self.options.checkpoint else None
        if state is None:
            return 0
        self._now = Progress(**state["progress"])
        self.module.load_state(state["module"])
        self._best = {n: like(v, self.module.tensor(n)) for n, v in state["best"].items()}
        self.processes.load_optimizer(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **state["schedule"]})
        for hook in self.hooks:
            if (own := state["hooks"].get(_name(hook))) is not None:
                hook.load_state(own)
        self._resumed_random = state["random"]
        self.ctx.report(f"going on from step {self._now.step} of {self.total}")
        return self._now.step

    def _restore_random(self, state: Mapping[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def _nothing_kept(message: str) -> InputError:
    return InputError(
        f"{message}, and no state before it counts as the best",
        hint="a smaller lr, a warm-up, or evaluations more often (evaluate_every)",
    )


def _name(hook: Hook) -> str:
    return type(hook).__qualname__
