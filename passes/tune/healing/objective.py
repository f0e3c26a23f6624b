"""What healing minimises: the distance of outputs, and of values inside, to the original's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from torchlathe.ir import PreconditionError, Program
from torchlathe.passes.base import PassContext
from torchlathe.passes.statistics.losses import loss_of
from torchlathe.passes.tune.distilling.logits import KnowledgeDistillation
from torchlathe.passes.tune.distilling.values import ValueMatching, relative_error
from torchlathe.passes.tune.healing.alignment import aligned_blocks, logits_among
from torchlathe.passes.tune.healing.reference import Reference, Told, fidelity, floating
from torchlathe.passes.tune.training import Forward

__all__ = ["BlockObjective", "HealingObjective", "Outputs", "output_names"]

Outputs = Literal["auto", "logits", "values"]


@dataclass
class HealingObjective:
    """Distillation from the original.

    Attributes:
        original: The program to match.
        program: What is healed.
        ctx: Has the user's loss.
        temperature: Of logits.
        hidden: Weight of hidden states, the outputs of blocks that both programs have.
        task: Weight of the user's own loss.
        outputs: Which outputs are logits; ``"auto"`` looks at names and at what computes them.
        taps: Names of the nodes of ``program`` whose values are needed.
    """

    original: Program
    program: Program
    ctx: PassContext
    temperature: float = 2.0
    hidden: float = 0.0
    task: float = 0.0
    outputs: Outputs = "auto"
    taps: list[str] = field(init=False)
    _logits: list[bool] = field(init=False, repr=False)
    _pairs: list[tuple[str, str]] = field(init=False, repr=False)
    _reference: Reference = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Find out what is to be compared.

        Raises:
            PreconditionError: No output can be.
        """
        names = output_names(self.original)
        self._logits = logits_among(self.original, names)
        if self.outputs != "auto":
            self._logits = [self.outputs == "logits"] * len(names)
        both = (p.output_node.args[0] for p in (self.program, self.original))
        values = [[getattr(n, "meta", {}).get("val") for n in nodes] for nodes in both]  # type: ignore[union-attr]
        if not floating(*values):
            raise PreconditionError("no output of the program is floating, so none can be matched")
        blocks = aligned_blocks(self.original, self.program) if self.hidden else {}
        self._pairs = list(blocks.values())
        self.taps = [mine for mine, _ in self._pairs]
        self._reference = Reference(self.original, [theirs for _, theirs in self._pairs])
        self._last: tuple[Forward, Told] | None = None

    def _told(self, forward: Forward) -> Told:
        # Metrics ask about the batch that the loss has just been computed on.
        if self._last is None or self._last[0] is not forward:
            self._last = forward, self._reference(forward)
        return self._last[1]

    def __call__(self, forward: Forward) -> torch.Tensor:
        """The loss of one batch."""
        told = self._told(forward)
        loss = torch.zeros(())
        for place in floating(forward.flat_outputs, told.outputs):
            mine, theirs = forward.flat_outputs[place].float(), told.outputs[place].float()
            matched = (
                KnowledgeDistillation(self.temperature) if self._logits[place] else ValueMatching()
            )
            loss = loss.to(mine.device) + matched(mine, theirs)
        for mine_name, their_name in self._pairs:
            found = relative_error(forward.taps[mine_name].float(), told.taps[their_name].float())
            loss = loss + self.hidden / len(self._pairs) * found
        if self.task and forward.training:
            loss = loss + self.task * loss_of(self.ctx, forward.outputs, forward.batch)
        return loss

    def metrics(self, forward: Forward) -> Mapping[str, float]:
        """Fidelity of the outputs."""
        return fidelity(forward.flat_outputs, self._told(forward).outputs, self._logits)


class BlockObjective:
    """Relative squared error of the outputs of blocks, each block by itself.

    Args:
        original: The program to match.
        program: What is healed.

    Attributes:
        taps: Names of the nodes of ``program`` whose values are needed.
    """

    def __init__(self, original: Program, program: Program) -> None:
        self._pairs = list(aligned_blocks(original, program).values())
        self.taps = [mine for mine, _ in self._pairs]
        self._reference = Reference(original, [theirs for _, theirs in self._pairs])

    def __call__(self, forward: Forward) -> torch.Tensor:
        """The mean over blocks."""
        told = self._reference(forward)
        found = [
            relative_error(forward.taps[mine].float(), told.taps[theirs].float())
            for mine, theirs in self._pairs
        ]
        return torch.stack(found).mean()


def output_names(program: Program) -> list[str]:
    """Where each flat output is in what the model returns, as a path: ``.logits``."""
    marks: Sequence[Any] = range(program.out_spec.num_leaves)
    paths, _ = pytree.tree_flatten_with_path(program.unflatten_outputs(marks))
    names = {mark: pytree.keystr(path) for path, mark in paths}
    return [names.get(mark, "") for mark in marks]
