"""How much a pass that factorises layers keeps: the options that all such passes have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchlathe.ir import OptionError
from torchlathe.passes.rewrite.allocation.budgets import budgets

__all__ = ["BUDGETS", "Amount", "AmountOptions"]

Amount = float | str | None
# Of the whole model; `share` is that of the layers alone.
BUDGETS = ("params", "bytes", "flops", "latency")


def _help(what: str, amounts: str) -> dict[str, str]:
    return {"help": f"{what} of the whole model to keep: a share up to 1, or {amounts}"}


@dataclass(frozen=True)
class AmountOptions:
    """Options of a pass that splits layers, at most one of which says how much is kept.

    A base class next to `RewritePass`; the pass calls `check_amounts` when it is made.

    Attributes:
        share: Of the parameters of the layers that the pass may split.
        params: Of the whole model, as for every pass with a budget; likewise the next three.
        bytes: Of all tensors.
        flops: At the sizes of the example inputs.
        latency: Measured on the example inputs.
        rank: The same for every layer.
        include: Patterns of tensors or modules.
        exclude: Likewise.
    """

    name: ClassVar[str]

    share: float | None = field(
        default=None,
        metadata={
            "help": "share of the parameters of the layers that it may split to keep; 0.5 unless "
            "something else says how much"
        },
    )
    params: Amount = field(default=None, metadata=_help("parameters", "a count such as 20M"))
    bytes: Amount = field(default=None, metadata=_help("bytes of tensors", "a size such as 40MB"))
    flops: Amount = field(
        default=None,
        metadata=_help("FLOPs at the sizes of the example inputs", "a count such as 1.5G"),
    )
    latency: Amount = field(
        default=None,
        metadata=_help("measured time of a run on the example inputs", "a time such as 5ms"),
    )
    rank: int | None = field(default=None, metadata={"help": "the same rank for every layer"})
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "split only these: patterns of tensors or modules"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors or modules"}
    )

    def check_amounts(self) -> None:
        """Refuse amounts that are impossible, or contradict one another.

        Raises:
            OptionError: More than one option says how much, or one is out of its range.
        """
        amounts = ("share", *BUDGETS, "rank")
        given = [name for name in amounts if getattr(self, name) is not None]
        if len(given) > 1:
            raise self.refused(f"{' and '.join(given)} all say how much to keep", "give one")
        if self.share is not None and not 0 < self.share < 1:
            raise self.refused(
                f"share is {self.share}, but must be between 0 and 1", "0.5 keeps half"
            )
        if self.rank is not None and self.rank < 1:
            raise self.refused(f"rank is {self.rank}, but must be at least 1")
        budgets({name: getattr(self, name) for name in BUDGETS}, self.name)

    @property
    def budget(self) -> tuple[str, float | str] | None:
        """Name and amount of the budget of the whole model, if one is given."""
        given: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in BUDGETS]
        return next(((name, amount) for name, amount in given if amount is not None), None)

    def refused(self, message: str, hint: str | None = None) -> OptionError:
        """The error about an option of this pass."""
        return OptionError(message, where=self.name, hint=hint)
