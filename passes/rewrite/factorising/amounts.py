"""The options that all passes that factorise layers have in common: how much, for whom, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torchlathe.ir import OptionError
from torchlathe.passes.rewrite.allocation.budgets import budgets

__all__ = ["BUDGETS", "Amount", "AmountOptions", "SplitOptions"]

Amount = float | str | None
# Of the whole model; `share` is that of the layers alone.
BUDGETS = ("params", "bytes", "flops", "latency")
# Up to so many layers a choice is made by integer programming where nothing else is said.
_MOST_EXACT = 512


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


@dataclass(frozen=True)
class SplitOptions(AmountOptions):
    """Those, and how the amount is shared out among layers and what errors are judged by.

    A base class next to `RewritePass`; the pass calls `check_split` when it is made.

    Attributes:
        allocation: Who gets how much.
        weigh: What is kept small in sum.
        damping: Of second moments.
        time: Whether split layers are measured.
    """

    allocation: Literal["auto", "uniform", "greedy", "exact"] = field(
        default="auto",
        metadata={
            "help": "how the budget is shared out: the same share for each layer, by equal slope "
            "of the errors, or by integer programming; auto is exact for up to 512 layers, else "
            "greedy, and uniform where the same is said for every layer"
        },
    )
    weigh: Literal["output", "layer"] = field(
        default="output",
        metadata={
            "help": "what an allocation keeps small: the error of each layer times its effect on "
            "the outputs, measured by splitting it alone, or the error of each layer as it is"
        },
    )
    damping: float = field(
        default=1e-6,
        metadata={
            "help": "how much directions that the calibration data never shows count, relative to "
            "the mean direction"
        },
    )
    time: bool = field(
        default=True,
        metadata={
            "help": "measure the split layers: take the faster way where there are several, and "
            "name those that are slower than before"
        },
    )

    def check_split(self) -> None:
        """Refuse options that are out of range or contradict one another.

        Raises:
            OptionError: Likewise.
        """
        self.check_amounts()
        self.check_shares("damping")
        if self.same_for_all and self.allocation not in ("auto", "uniform"):
            raise self.refused(
                f"{self.same_for_all} says the same for every layer, and "
                f"allocation={self.allocation} chooses",
                f"give share or params instead of {self.same_for_all}",
            )

    def check_shares(self, *names: str) -> None:
        """Refuse options that are not between 0 and 1.

        Raises:
            OptionError: One is not.
        """
        for name in names:
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise self.refused(f"{name} is {value}, but must be between 0 and 1")

    @property
    def same_for_all(self) -> str | None:
        """Name of the option that says the same for every layer, if one is given."""
        return None if self.rank is None else "rank"

    def shared_out(self, layers: int) -> Literal["uniform", "greedy", "exact"]:
        """``allocation`` for so many layers."""
        if self.allocation != "auto":
            return self.allocation
        if self.same_for_all:
            return "uniform"
        return "exact" if layers <= _MOST_EXACT else "greedy"
