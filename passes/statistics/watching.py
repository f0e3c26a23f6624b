"""What is to be collected: which node's value or gradient, seen as which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from torchlathe.ir import OptionError
from torchlathe.passes.statistics.accumulators import Accumulator
from torchlathe.passes.statistics.telling import callable_text

__all__ = ["Watch"]


@dataclass(frozen=True, eq=False)
class Watch:
    """What to collect of one node's value.

    Attributes:
        node: The node: a call, or an input of the program.
        rows: From its value to what is added up; for moments (groups, rows, extent). It may also
            yield this in parts, where all at once would take much memory.
        matrix: Whether to collect second moments, besides sums and sums of squares.
        gradient: Collect the gradient of the loss with respect to the value, instead of the
            value; it is that of the loss of one sample, if the loss is a mean over samples.
        into: What to add to instead of new `Moments`; anything with an ``add``.
        beside: Nodes before this one, whose values ``rows`` is given too; not for gradients.
    """

    node: fx.Node
    rows: Callable[..., torch.Tensor | Iterator[torch.Tensor]]
    matrix: bool = False
    gradient: bool = False
    into: Accumulator | None = None
    beside: tuple[fx.Node, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be watched.

        Raises:
            OptionError: A gradient beside values.
        """
        if self.gradient and self.beside:
            raise OptionError("a gradient has no values beside it: watch the values instead")

    @classmethod
    def axis(cls, node: fx.Node, axis: int, **options: Any) -> Watch:
        """The indices of one axis as features, and all else as samples.

        Args:
            node: The node.
            axis: Of its value.
            **options: Further attributes of the watch.
        """
        return cls(node, partial(_axis_rows, axis=axis), **options)

    @classmethod
    def whole(cls, node: fx.Node, into: Accumulator) -> Watch:
        """The value as it is, into an accumulator that knows what to do with it."""
        return cls(node, _whole, into=into)

    def add(
        self,
        to: Accumulator,
        value: torch.Tensor,
        samples: int | None = None,
        others: Sequence[torch.Tensor] = (),
    ) -> None:
        """Add the rows of a value.

        Args:
            to: What to add to.
            value: Of the node, or the gradient for it.
            samples: How many samples the value has, if it is a gradient.
            others: Values of ``beside``.
        """
        rows = self.rows(value, *others)
        for part in (rows,) if isinstance(rows, torch.Tensor) else rows:
            to.add(part, samples)
            samples = None if samples is None else 0  # once is enough

    def describe(self) -> str:
        """A line that is the same for the same watch in another process."""
        into = "" if self.into is None else self.into.describe()
        rows = callable_text(self.rows)
        nodes = ",".join(node.name for node in (self.node, *self.beside))
        return f"{nodes}|{rows}|{self.matrix}|{self.gradient}|{into}"


def _axis_rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    return value.movedim(axis, -1).reshape(1, -1, value.shape[axis])


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value
