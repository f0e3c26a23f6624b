"""Passes to test the infrastructure with: one option of each type, and every way to misbehave."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn

from torchlathe.ir import Analysis, OptionError, Program
from torchlathe.passes import (
    AnalysisPass,
    Diagnostic,
    Exactness,
    Fact,
    PassContext,
    PassResult,
    RewritePass,
)

aten = torch.ops.aten


class Colour(enum.Enum):
    RED = 1
    DARK_BLUE = 2


@dataclass(frozen=True)
class Everything(RewritePass):
    """Has an option of each type."""

    name: ClassVar[str] = "everything"
    flag: bool = False
    count: int = 0
    ratio: float = 0.5
    text: str = ""
    scope: Literal["global", "local"] = "global"
    bits: Literal[4, 8] | None = None
    colour: Colour = Colour.RED
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    items: list[int] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict)
    nested: Mapping[str, Sequence[int]] = field(default_factory=dict)
    mixed: bool | int | float | str | tuple[str, ...] | None = None
    share: float | dict[str, float] = field(default=0.5, metadata={"help": "how much"})
    function: Literal["l2"] | Callable[..., Any] | torch.Tensor = "l2"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False)


@dataclass(frozen=True)
class Picky(RewritePass):
    """Needs an option, and refuses values."""

    name: ClassVar[str] = "picky"
    round_to: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_to < 1:
            raise OptionError(f"round_to must be positive, got {self.round_to}", hint="use 1")
        if self.scale < 0 and self.round_to > 1:
            raise OptionError("this cannot be")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False)


@dataclass(frozen=True)
class ReluCount(AnalysisPass[int]):
    """Counts relus."""

    name: ClassVar[str] = "relu-count"

    def compute(self, program: Program) -> int:
        return len(relus(program))

    def statistics(self, result: int) -> dict[str, int | float]:
        return {"relus": result}


@dataclass(frozen=True)
class NodeCount(Analysis[int]):
    name: ClassVar[str] = "node-count"

    def compute(self, program: Program) -> int:
        return len(program.graph.nodes)


class NoRelu(Fact):
    name = "no relu"

    @classmethod
    def holds(cls, program: Program) -> bool:
        return not relus(program)


def relus(program: Program) -> list[fx.Node]:
    return program.graph.find_nodes(op="call_function", target=aten.relu.default)


@dataclass(frozen=True)
class Nothing(RewritePass):
    name: ClassVar[str] = "nothing"
    requires: ClassVar = (ReluCount,)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False)


@dataclass(frozen=True)
class ReluToClamp(RewritePass):
    """Exact, and keeps what the analyses below say."""

    name: ClassVar[str] = "relu-to-clamp"
    preserves: ClassVar = frozenset({NodeCount})
    provides: ClassVar[tuple[type[Fact], ...]] = (NoRelu,)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        found = relus(program)
        with program.edit(by=ctx.spec) as edit:
            for node in found:
                clamp = edit.call(aten.clamp.default, (node.args[0], 0.0), like=node)
                edit.replace(node, clamp)
        notes = [Diagnostic.at(node, "now a clamp") for node in found]
        return PassResult(bool(edit.count), {"clamps": len(found)}, notes)


@dataclass(frozen=True)
class ClampToRelu(RewritePass):
    name: ClassVar[str] = "clamp-to-relu"
    needs: ClassVar = (NoRelu,)
    breaks: ClassVar = (NoRelu,)
    exactness: ClassVar = Exactness.APPROXIMATE
    bend: float = 1.0

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        found = program.graph.find_nodes(op="call_function", target=aten.clamp.default)
        with program.edit(by=ctx.spec) as edit:
            for node in found:
                relu = edit.call(aten.relu.default, (node.args[0],), like=node)
                edit.replace(node, edit.call(aten.mul.Tensor, (relu, self.bend), like=relu))
        return PassResult(bool(edit.count))


@dataclass(frozen=True)
class Misbehave(RewritePass):
    """Does one wrong thing."""

    name: ClassVar[str] = "misbehave"
    preserves: ClassVar = frozenset({ReluCount})
    how: str = "raise"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = getattr(self, f"_{self.how}")(program)
        return result if result is not None else PassResult(changed=True)

    def _raise(self, program: Program) -> None:
        for node in relus(program):
            with program.edit() as edit:
                edit.set_target(node, aten.sigmoid.default)
            raise IndexError(f"no such thing as {node.name}")

    def _change_the_function(self, program: Program) -> None:
        with program.edit() as edit:
            edit.set_target(relus(program)[0], aten.sigmoid.default)

    def _claim_no_change(self, program: Program) -> PassResult:
        self._change_the_function(program)
        return PassResult(changed=False)

    def _claim_change(self, program: Program) -> None:
        pass

    def _edit_raw(self, program: Program) -> PassResult:
        relus(program)[0].target = aten.sigmoid.default
        return PassResult(changed=False)

    def _return_nothing(self, program: Program) -> Any:
        return 3

    def _write_in_place(self, program: Program) -> None:
        with torch.no_grad():
            next(iter(program.parameters.values())).mul_(1.0)

    def _lose_metadata(self, program: Program) -> None:
        with program.edit() as edit:
            edit.set_target(relus(program)[0], aten.relu6.default)
        del program.graph.find_nodes(op="call_function", target=aten.relu6.default)[0].meta["val"]

    def _lie_about_analysis(self, program: Program) -> None:
        node = relus(program)[0]
        with program.edit() as edit:
            edit.replace(node, edit.call(aten.clamp.default, (node.args[0], 0.0), like=node))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
