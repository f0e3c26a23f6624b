"""Low-rank adapters: put beside frozen layers, trained, and taken into their weights again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from torchlathe.ir import Edit, OptionError, Program, TensorKind
from torchlathe.ir.provenance import info
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.factorising.sites import Site, chosen_sites, find_sites
from torchlathe.passes.rewrite.factorising.telling import left_alone, listed
from torchlathe.passes.rewrite.factorising.writing import add_factor, stem_of

__all__ = ["InsertLora", "MergeLora", "is_rank"]

aten = torch.ops.aten
# Which argument of a linear layer's call is its matrix.
_MATRIX: dict[Any, int] = {
    aten.linear.default: 1,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    aten.addmm.default: 2,
}
# How adapters are known again: the ends of their names.
_DOWN, _UP = "lora_down", "lora_up"
_IS_DOWN, _IS_UP = (re.compile(rf"(?:^|[._]){end}\d*\.weight$") for end in (_DOWN, _UP))


@dataclass(frozen=True)
class InsertLora(RewritePass):
    """Adds ``up(down(x))`` of a low rank to linear layers, and lets only that train.

    ``up`` starts at zero, so that the program computes what it did; all other parameters are
    frozen. `MergeLora` adds the product to the weight of the layer and is rid of the adapter.

    Keeps: the function. Changes: new parameters, and which ones train.

    Source: LoRA (arXiv 2106.09685), without its scale: optimizers that normalise their steps take
    it for another learning rate.
    """

    name: ClassVar[str] = "insert-lora"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    rank: int = field(default=8, metadata={"help": "of the adapters"})
    include: tuple[str, ...] = field(
        default=(), metadata={"help": "patterns of layers; all linear ones by default"}
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors or modules"}
    )

    def __post_init__(self) -> None:
        """Refuse a rank below 1.

        Raises:
            OptionError: It is.
        """
        super().__post_init__()
        if self.rank < 1:
            raise OptionError(f"rank is {self.rank}, but must be at least 1", where=self.name)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Insert the adapters, and freeze the rest."""
        sites, left = chosen_sites(
            *find_sites(program), self.include, self.exclude, embeddings=False, where=self.name
        )
        adapters = {s.weight for s in sites if is_rank(s.weight) or _IS_UP.search(s.weight)}
        left |= {name: "it is an adapter itself" for name in adapters}
        sites = [site for site in sites if site.weight not in adapters]
        chosen = [site for site in sites if site.kind == "linear"]
        left |= {s.weight: "it is no linear layer" for s in sites if s.kind != "linear"}
        diagnostics = list(left_alone(left)) if self.include or not chosen else []
        if not chosen:
            nothing = Diagnostic("warning", "there is no layer to add an adapter to")
            return PassResult(False, {"adapters": 0}, [nothing, *diagnostics])
        _set_trainable(program, False)
        generator = torch.Generator().manual_seed(ctx.seed)
        with program.edit(by=ctx.spec) as edit:
            for site in chosen:
                self._insert(edit, site, generator)
        trained = sum(p.numel() for p in program.parameters.values() if p.requires_grad)
        names = listed([site.weight for site in chosen])
        diagnostics.append(Diagnostic("note", f"adapters beside {names}"))
        statistics: dict[str, int | float | str] = {
            "adapters": len(chosen),
            "trainable_parameters": trained,
        }
        return PassResult(True, statistics, diagnostics)

    def _insert(self, edit: Edit, site: Site, generator: torch.Generator) -> None:
        weight = edit.program.tensor(site.weight)
        rank, stem = min(self.rank, site.ins, site.outs), stem_of(site.weight)
        # As wide as a linear layer's own weights, which is what LoRA takes.
        drawn = torch.rand(rank, site.ins, generator=generator) * 2 - 1
        first = (drawn * site.ins**-0.5).to(weight.device, weight.dtype)
        down = add_factor(edit, f"{stem}{_DOWN}", first, True)
        up = add_factor(edit, f"{stem}{_UP}", weight.detach().new_zeros(site.outs, rank), True)
        for call in site.calls:
            users, after = list(call.users), call.next
            low = edit.call(
                aten.linear.default, (site.operand(call), down), like=call, before=after
            )
            back = edit.call(aten.linear.default, (low, up), like=call, before=after)
            whole = edit.call(aten.add.Tensor, (call, back), like=call, before=after)
            edit.replace(call, whole, users)


@dataclass(frozen=True)
class MergeLora(RewritePass):
    """Adds each adapter of `InsertLora` to the weight of its layer: ``W + up down``.

    Keeps: the function, up to rounding. Changes: adapters are gone, and what was frozen trains
    again.

    Source: LoRA (arXiv 2106.09685), section 4.1.
    """

    name: ClassVar[str] = "merge-lora"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    thaw: bool = field(default=True, metadata={"help": "let all parameters train again"})

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Merge the adapters."""
        found = list(_adapters(program))
        if not found:
            told = Diagnostic("warning", "there is no adapter to merge; insert-lora adds some")
            return PassResult(False, {"adapters": 0}, [told])
        merged: set[str] = set()
        while found:  # a layer may have an adapter beside an adapter
            with program.edit(by=ctx.spec) as edit:
                done: set[str] = set()
                for whole, call, weight, down, up in found:
                    if up not in done:
                        _merge(edit, call, weight, down, up)
                        done.add(up)
                    edit.replace(whole, call)
            merged |= done
            found = list(_adapters(program))
        if self.thaw:
            _set_trainable(program, True)
        return PassResult(True, {"adapters": len(merged)})


def _adapters(program: Program) -> Iterator[tuple[fx.Node, fx.Node, str, str, str]]:
    """Each sum of a layer and an adapter: the sum, the layer's call, and names of the tensors."""
    for node in program.graph.nodes:
        if node.target is not aten.add.Tensor or not all(
            isinstance(x, fx.Node) for x in node.args[:2]
        ):
            continue
        call, back = node.args[:2]
        up = _weight(back)
        if up is None or not _IS_UP.search(up) or not _is_product(back):
            continue
        low = back.args[0]
        down, weight = _weight(low), _weight(call)
        if down is None or weight is None or not is_rank(down) or not _is_product(low):
            continue
        if low.args[0] is call.args[_MATRIX[call.target] - 1]:  # and not of something else
            yield node, call, weight, down, up


def _is_product(call: fx.Node) -> bool:
    """Whether a linear layer has no bias, as `InsertLora` leaves it."""
    return call.target is aten.linear.default and len(call.args) < 3 and not call.kwargs


def is_rank(name: str) -> bool:
    """Whether the rows of a tensor are the rank of an adapter, which no layer but itself sees."""
    return _IS_DOWN.search(name) is not None


def _weight(call: Any) -> str | None:
    """Name of the matrix that a call of a layer reads."""
    if not isinstance(call, fx.Node):
        return None
    place = _MATRIX.get(call.target)
    matrix = call.args[place] if place is not None else None
    return info(matrix).tensor if isinstance(matrix, fx.Node) else None


def _merge(edit: Edit, call: fx.Node, weight: str, down: str, up: str) -> None:
    program = edit.program
    old = program.tensor(weight).detach()
    product = program.tensor(up).detach().double() @ program.tensor(down).detach().double()
    if call.target is not aten.linear.default:
        product = product.T
    edit.set_tensor(weight, (old.double() + product).to(old.dtype))


def _set_trainable(program: Program, trains: bool) -> None:
    """Freeze or thaw all parameters; those of the user's model keep their flags."""
    for name, entry in list(program.entries.items()):
        tensor = entry.tensor
        if entry.kind is not TensorKind.PARAMETER or not tensor.is_floating_point():
            continue
        if tensor.requires_grad != trains:
            own = torch.nn.Parameter(tensor.detach(), requires_grad=trains)
            program.entries[name] = replace(entry, tensor=own)
