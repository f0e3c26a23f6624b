"""Ops that work element by element, under broadcasting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import SINGULAR, UNKNOWN, ZERO, Rule, Terms, Value, Values, argument

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["PReLU", "Pointwise", "evaluate"]

_RANDOM = torch.Tag.nondeterministic_seeded


@dataclass(frozen=True)
class Pointwise(Rule):
    """``out[i] = f(a[i], b[i], ...)``.

    Attributes:
        zero: Which zeros survive: "identity" passes the first operand's value on, "product" is
            zero if any operand is, "quotient" if the first is, "branches" if both branches of a
            ``where`` are, "function" is evaluated on the known constants.
    """

    zero: Literal["identity", "product", "quotient", "branches", "function"] = "function"

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Operands broadcast against each other."""
        if self.zero == "identity":
            # A second operand, as that of type_as, gives its dtype and nothing else.
            return ax.terms(node.args[0])
        operands = [ax.terms(n) for n in node.all_input_nodes]
        return ax.broadcast(operands, node.meta["val"].dim())

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Per axis, the function of what the operands hold there."""
        rank = flow.rank(node)
        source = node.args[0]
        if self.zero == "identity":
            assert isinstance(source, fx.Node)
            dtype = node.meta["val"].dtype
            passed = [_cast(flow.value(source, axis), dtype) for axis in range(rank)]
            return tuple(_dropped(node, value) for value in passed)
        out: list[Value | None] = []
        for axis in range(rank):
            if not flow.on(node, axis):
                out.append(None)
                continue
            values: dict[fx.Node, Value | None] = {}
            for used in node.all_input_nodes:
                index = axis - rank + flow.rank(used)
                values[used] = flow.value(used, index) if index >= 0 else None
            out.append(self._combine(node, values))
        return tuple(out)

    def _combine(self, node: fx.Node, values: dict[fx.Node, Value | None]) -> Value:
        known = [v for v in values.values() if v is not None]
        first = values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if self.zero == "product" and any(v.is_zero for v in known):
            return ZERO
        if self.zero == "quotient":
            divisor = values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
            if divisor is not None and divisor.is_zero:
                return SINGULAR
            if first is not None and first.is_zero:
                return ZERO
        if self.zero == "branches":
            branches = [values.get(n) for n in node.args[1:3] if isinstance(n, fx.Node)]
            numbers = [n for n in node.args[1:3] if isinstance(n, int | float)]
            same = {b.constant if b else None for b in branches} | {float(n) for n in numbers}
            return Value(same.pop()) if len(same) == 1 else UNKNOWN
        if len(known) < len(values):
            return UNKNOWN  # an operand that does not carry the atom may hold anything
        return evaluate(node, {n: v for n, v in values.items() if v is not None})


def _dropped(node: fx.Node, value: Value | None) -> Value | None:
    """Active dropout keeps zeros, and makes other constants random; alpha dropout moves zeros."""
    if value is None or not argument(node, "train", False):
        return value
    moved = "alpha" in node.target._schema.name  # type: ignore[union-attr]
    return value if value.is_zero and not moved else UNKNOWN


def _cast(value: Value | None, dtype: torch.dtype) -> Value | None:
    """What a constant is in another dtype: one half is 0 as an integer, and 1 as a bool."""
    if value is None or not value.constant or dtype.is_floating_point or dtype.is_complex:
        return value
    return Value(float(torch.tensor(value.constant, dtype=torch.float64).to(dtype)))


def evaluate(node: fx.Node, values: dict[fx.Node, Value]) -> Value:
    """Run the op on constants; unknown unless all are known, singular if it has no finite value."""
    constants = {n: v.constant for n, v in values.items()}
    tags = getattr(node.target, "tags", ())
    if any(c is None or (c and _RANDOM in tags) for c in constants.values()):
        return UNKNOWN

    def constant(used: fx.Node) -> torch.Tensor:
        value = torch.tensor(constants[used], dtype=torch.float64)
        fake = used.meta["val"]
        return value if fake.is_floating_point() else value.to(fake.dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), constant)
    assert callable(node.target)
    try:
        result = float(node.target(*args, **kwargs))
    except Exception:
        return UNKNOWN
    return Value(result) if math.isfinite(result) else SINGULAR


class PReLU(Rule):
    """``prelu``: one slope per channel (axis 1), or one for all."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The slopes have the channels' term."""
        terms = ax.terms(node.args[0])
        slopes = ax.terms(node.args[1])
        if slopes and not is_one(slopes[0]):
            ax.unify(terms[1 if len(terms) > 1 else 0], slopes[0])
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Zero stays zero whatever the slope."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        values = [flow.value(source, axis) for axis in range(flow.rank(node))]
        return tuple(v if v is None or v.is_zero else UNKNOWN for v in values)
