"""Erase whole channels, heads and other coupled slices, lowest importance first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from torchlathe.ir import OptionError, PreconditionError, Program
from torchlathe.ir.cost.latency import LatencyTable
from torchlathe.ir.fakes import valueless
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.base import Exactness, Fact, PassContext, PassResult, RewritePass
from torchlathe.passes.importance import Criterion, criterion_names, get_criterion, need_values
from torchlathe.passes.quantities import Quantity
from torchlathe.passes.rewrite.allocation.budgets import Ramp, budgets
from torchlathe.passes.rewrite.allocation.ladders import Floors
from torchlathe.passes.rewrite.erasing.choosing import Choice
from torchlathe.passes.rewrite.erasing.run import EraseRun
from torchlathe.passes.rewrite.quantising.facts import Unpacked

__all__ = ["StructuredErase"]

Budget = float | str | None


def _help(what: str, amounts: str) -> dict[str, str]:
    return {"help": f"{what} of the whole model to keep: a share up to 1, or {amounts}"}


@dataclass(frozen=True)
class StructuredErase(RewritePass):
    """Erases the least important units of the families of coupled slices.

    Keeps: the outputs of the model in which the slices that write the erased indices are zero
    (exactly; means and norms over an erased axis are corrected). Changes: shapes of parameters,
    and every static integer that follows from them.

    Families whose erasing cannot be made exact are left alone unless ``approximate`` is set;
    ``torchlathe inspect MODEL --families`` lists them with the reasons.

    Source: own (axis terms); the norm corrections are derived in ``docs/structured_erase.md``.
    """

    name: ClassVar[str] = "structured-erase"
    requires: ClassVar = (ZeroInvariantGroups,)
    exactness: ClassVar[Exactness] = Exactness.EXACT
    needs: ClassVar[tuple[type[Fact], ...]] = (Unpacked,)

    sparsity: float | dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "share of the prunable parameters to erase, in [0, 1); or a dict from family "
            "name (or pattern with * and ?) to the share of its units; 0.5 unless there is a "
            "budget"
        },
    )
    params: Budget = field(default=None, metadata=_help("parameters", "a count such as 20M"))
    bytes: Budget = field(default=None, metadata=_help("bytes of tensors", "a size such as 40MB"))
    flops: Budget = field(
        default=None,
        metadata=_help("FLOPs at the example sizes", "a count such as 1.5G"),
    )
    latency: Budget = field(
        default=None,
        metadata=_help("measured latency", "a time such as 5ms"),
    )
    importance: (
        str | Criterion | Callable[..., torch.Tensor] | torch.Tensor | dict[str, torch.Tensor]
    ) = field(
        default="l2",
        metadata={
            "help": f"{', '.join(criterion_names())}; from Python also a criterion, a callable "
            "(family, program) -> scores, a tensor of scores, or a dict of them by family name"
        },
    )
    scope: Literal["global", "local", "isomorphic"] = field(
        default="global",
        metadata={
            "help": "rank units over all families; erase the same share of each; or rank within "
            "groups of families of the same structure, and erase the same share of each group"
        },
    )
    cost_aware: bool = field(
        default=False,
        metadata={"help": "rank by importance over what a unit saves of the budget"},
    )
    round_to: int = field(
        default=1, metadata={"help": "kept units per family are a multiple of this"}
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "erase only these: patterns of families, tensors written, or tensor:axis"
        },
    )
    exclude: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "leave these alone: patterns of families, any of their tensors, or tensor:axis"
        },
    )
    keep_at_least: float = field(
        default=1, metadata={"help": "units to keep per family: a count, or a share if below 1"}
    )
    steps: int = field(
        default=1, metadata={"help": "erase in so many steps, each with new importance"}
    )
    ramp: Literal["geometric", "linear"] = field(
        default="geometric",
        metadata={"help": "whether each step erases the same share of what is left, or as much"},
    )
    between: Callable[[torch.nn.Module, int], object] | None = field(
        default=None,
        metadata={"help": "called with a trainable module and the step, after each but the last"},
    )
    compensate: bool = field(
        default=False,
        metadata={"help": "refit what reads erased units by least squares on calibration data"},
    )
    zeros: bool = field(
        default=False, metadata={"help": "erase just the units that are zero already"}
    )
    approximate: bool = field(
        default=False, metadata={"help": "also erase families for which it is not exact"}
    )
    latency_table: LatencyTable | None = field(
        default=None, metadata={"help": "measurements to use and to add to"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: A share outside [0, 1), a count below 1, a budget that is no amount, or
                options that exclude each other.
        """
        super().__post_init__()
        self._check_amounts()
        self._check_together()
        if isinstance(self.importance, str):
            get_criterion(self.importance)

    def _check_amounts(self) -> None:
        given = 0.5 if self.sparsity is None else self.sparsity
        shares = given if isinstance(given, Mapping) else {"": given}
        for pattern, share in shares.items():
            if not 0 <= share < 1:
                at = f" for {pattern!r}" if pattern else ""
                raise OptionError(
                    f"sparsity{at} is {share}, but must be in [0, 1)",
                    where=self.name,
                    hint="it is the share that is erased: 0.5 halves the prunable parameters",
                )
        for name, count in (("round_to", self.round_to), ("steps", self.steps)):
            if count < 1:
                raise OptionError(f"{name} is {count}, but must be at least 1", where=self.name)
        least = self.keep_at_least
        if not least > 0 or (least >= 1 and least % 1 != 0):
            raise OptionError(
                f"keep_at_least is {least}, but must be a share between 0 and 1, or a whole number",
                where=self.name,
            )

    def _check_together(self) -> None:
        budgets = self.budgets
        if budgets and self.sparsity is not None:
            raise OptionError(
                f"{next(iter(budgets))} and sparsity both say how much to erase",
                where=self.name,
                hint="sparsity is a share of the prunable parameters to erase, a budget a share "
                "of the whole model to keep; give one of the two",
            )
        how_much = [*budgets, *(["sparsity"] if self.sparsity is not None else [])]
        if self.zeros and (how_much or self.steps > 1):
            name = [*how_much, "steps"][0]
            raise OptionError(
                f"{name} does not go with zeros, which erases just what is zero", where=self.name
            )
        if self.cost_aware and (self.scope == "local" or isinstance(self.sparsity, Mapping)):
            raise OptionError(
                "cost_aware ranks units of different families, and here each family is ranked "
                "by itself",
                where=self.name,
                hint="use scope=global or scope=isomorphic, and one share for all",
            )
        if self.between is not None and self.steps < 2:
            raise OptionError(
                "between is called between steps, and there is one step",
                where=self.name,
                hint="give steps=2 or more",
            )

    @property
    def budgets(self) -> dict[str, Quantity]:
        """The budgets that were given, read."""
        given = {
            "params": self.params,
            "bytes": self.bytes,
            "flops": self.flops,
            "latency": self.latency,
        }
        return budgets(given, self.name)

    @property
    def choice(self) -> Choice:
        """Which families may be erased."""
        only = tuple(self.sparsity) if isinstance(self.sparsity, Mapping) else None
        return Choice(self.include, self.exclude, only, self.approximate)

    @property
    def floors(self) -> Floors:
        """The fewest units that a family keeps."""
        return Floors(self.keep_at_least, self.round_to)

    @property
    def schedule(self) -> Ramp:
        """How much each step erases."""
        return Ramp(self.steps, self.ramp)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what asks for values, of a model that was made without any.

        Raises:
            PreconditionError: The model is on the meta device, or fake.
        """
        empty = next((n for n, tensor in program.parameters.items() if valueless(tensor)), None)
        if empty is None:
            return
        measures = self.latency_table is None or self.latency_table.measure
        asked = {
            "zeros": self.zeros,
            "compensate": self.compensate,
            "latency": self.latency is not None and measures,
        }
        for name, given in asked.items():
            if given:
                raise PreconditionError(
                    f"{name} asks for values, but {empty} has none: the model is on the meta "
                    "device, or fake",
                    hint="budgets in params, bytes and flops need no values",
                )
        if not self.zeros:
            need_values(self.importance, program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Choose units, erase them, and say what was left alone and why."""
        return EraseRun(self, program, ctx).run()
