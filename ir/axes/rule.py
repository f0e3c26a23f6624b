"""What a rule tells about one op: how its axes relate, where zeros go, which integers are shapes.

A rule has three methods, one for each question that the compiler asks about a node:

- `Rule.infer`: which terms do the axes of the result have? (unifies those of the inputs)
- `Rule.flow`: if an index of an atom is zero (or a constant) in the inputs, what is it in the
  result, and is anything else changed by leaving it out?
- `Rule.resize`: which arguments have to change when indices are left out?
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from torchlathe.ir.axes.terms import Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["SINGULAR", "UNKNOWN", "ZERO", "Layout", "Rule", "Terms", "Value", "Values", "join"]

# One term per dimension; a list of them for an op with several results.
Terms: TypeAlias = "tuple[Term, ...] | list[tuple[Term, ...] | None]"


@dataclass(frozen=True)
class Value:
    """What a tensor holds at the erased indices of one axis.

    Attributes:
        constant: The one value that it has there for every input; None if that is not known.
        singular: Whether it may be infinite or not a number there (``1 / 0``), so that not even a
            product with zero is zero.
    """

    constant: float | None
    singular: bool = False

    @property
    def is_zero(self) -> bool:
        """Whether it is zero for every input."""
        return self.constant == 0.0


ZERO = Value(0.0)
UNKNOWN = Value(None)
SINGULAR = Value(None, singular=True)

# Per dimension of a result: its value at the erased indices, None where the atom is not on it.
# A list of them for an op with several results.
Values: TypeAlias = "tuple[Value | None, ...] | list[tuple[Value | None, ...]]"


def join(values: list[Value]) -> Value:
    """What is known of an index that may hold any of these."""
    first = values[0]
    if any(v.singular for v in values):
        return SINGULAR
    return first if all(v == first for v in values) else UNKNOWN


@dataclass
class Layout:
    """Letters on the axes of a contraction, as in einsum; one axis may hold several (row-major).

    Attributes:
        operands: Letters per axis, by operand node.
        factors: Operands that are multiplied.
        addends: Operands that are added to the product.
        output: Letters per axis of the result.
        letters: The term of each letter.
    """

    factors: list[tuple[fx.Node, tuple[tuple[str, ...], ...]]] = field(default_factory=list)
    addends: list[tuple[fx.Node, tuple[tuple[str, ...], ...]]] = field(default_factory=list)
    output: tuple[tuple[str, ...], ...] = ()
    letters: dict[str, Term] = field(default_factory=dict)

    @property
    def contracted(self) -> set[str]:
        """Letters that are summed over."""
        out = {letter for axis in self.output for letter in axis}
        return {letter for _, axes in self.factors for axis in axes for letter in axis} - out


class Rule:
    """Knowledge about one op, or about a family of ops that behave alike."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Unify the terms of the inputs as the op demands, and return those of the result."""
        raise NotImplementedError

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The value of the result at the erased indices, per dimension.

        Reports through ``flow`` what leaving the indices out would change elsewhere.
        """
        raise NotImplementedError

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Recompute the arguments that are shapes, and apply corrections. Default: none."""

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """Dimensions of an operand that the op sums over, so that its indices are only read."""
        return set()


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of a node by its schema name, whether given by position or by keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    found = _schema_arguments(node.target).get(name)
    if found is None:
        return default
    index, has_default, value = found
    if index < len(node.args):
        return node.args[index]
    return value if has_default else default


@functools.cache
def _schema_arguments(target: Any) -> dict[str, tuple[int, bool, Any]]:
    """Per argument of an op its place, whether it has a default value, and the value."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {}
    return {
        a.name: (
            index,
            a.has_default_value(),
            a.default_value if a.has_default_value() else None,
        )
        for index, a in enumerate(schema.arguments)
    }


def with_arguments(node: fx.Node, new: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The node's arguments with some replaced by schema name."""
    args, kwargs = list(node.args), dict(node.kwargs)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in new.items():
        index = names.index(name)
        if index < len(args):
            args[index] = value
        else:
            kwargs[name] = value
    return tuple(args), kwargs
