"""Another order of channels, in which a pattern of zeros loses less; the outputs stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from torchlathe.ir import Edit, OptionError, Program
from torchlathe.ir.analysis import Analysis
from torchlathe.ir.axes import Atom
from torchlathe.passes.analysis.families import Families, Family, ZeroInvariantGroups
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.erasing.units import unit_indices
from torchlathe.passes.rewrite.factorising.sites import Site, find_sites
from torchlathe.passes.rewrite.sparsifying.ordering import kept_energy, search_order
from torchlathe.passes.rewrite.sweeping.patterns import Pattern, parse_pattern

__all__ = ["PermuteChannels", "permute_units"]


@dataclass(frozen=True)
class PermuteChannels(RewritePass):
    """Puts channels into an order in which N of M neighbours keep more of the weights.

    Each family of coupled slices may be in any order, as long as everything that belongs to it is
    in the same one: writers, readers, norms and running statistics. So this is exact, and it is
    checked. It comes before `sparsify-nm`, with the same pattern.

    Keeps: every node and every shape. Changes: the order of slices.

    Source: Pool and Yu (NeurIPS 2021) for the idea; what may be permuted comes from axis terms.
    """

    name: ClassVar[str] = "permute-channels"
    requires: ClassVar[tuple[type[Analysis], ...]] = (ZeroInvariantGroups,)  # type: ignore[type-arg]
    exactness: ClassVar[Exactness] = Exactness.EXACT

    pattern: str = field(default="2:4", metadata={"help": "N:M that the order is good for"})
    rounds: int = field(
        default=50, metadata={"help": "of random pairs of groups that swap their best columns"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: The pattern is none of N:M, or there is no round.
        """
        super().__post_init__()
        if self._pattern.kind != "n:m":
            raise OptionError(
                f"the pattern {self.pattern} does not depend on the order of channels",
                where=self.name,
                hint="give N:M, such as 2:4",
            )
        if self.rounds < 1:
            raise OptionError(f"rounds is {self.rounds}, but must be 1 or more", where=self.name)

    @property
    def _pattern(self) -> Pattern:
        return parse_pattern(self.pattern, 0.5, 32, self.name)

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse what cannot work, before any pass runs.

        Raises:
            PreconditionError: There are no weights.
        """
        self.need_values(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Search an order for each family that layers read, and put it in place."""
        families = ctx.analysis(ZeroInvariantGroups)
        pattern = self._pattern
        generator = torch.Generator().manual_seed(ctx.seed)
        orders: dict[Family, Tensor] = {}
        told, before, after = [], [], []
        chosen = list(_read_families(program, families, pattern.span))
        for number, (family, sites) in enumerate(chosen):
            ctx.report(f"an order for {family.name} ({number + 1}/{len(chosen)})")
            energy = torch.cat([_energy(program, site) for site in sites])
            order = search_order(
                energy, pattern.keep, pattern.span, rounds=self.rounds, generator=generator
            )
            old = kept_energy(energy, pattern.keep, pattern.span)
            new = kept_energy(energy[:, order], pattern.keep, pattern.span)
            before.append(old)
            after.append(new)
            if not torch.equal(order, torch.arange(len(order))):
                orders[family] = order
            text = f"{pattern} keeps {new:.2%} of the squared weights that read it, from {old:.2%}"
            told.append(Diagnostic("note", text, name=family.name))
        statistics: dict[str, int | float | str] = {"families": len(orders)}
        if not orders:
            text = "no family is read in an order that could be better"
            return PassResult(False, statistics, [Diagnostic("note", text), *told])
        with program.edit(by=ctx.spec) as edit:
            permute_units(edit, families, orders)
        statistics["kept_before"] = sum(before) / len(before)
        statistics["kept_after"] = sum(after) / len(after)
        return PassResult(True, statistics, told)


def _read_families(
    program: Program, families: Families, span: int
) -> Iterator[tuple[Family, list[Site]]]:
    """Families that are all columns of layers, with these layers."""
    by_atom: dict[int, list[Site]] = {}
    for site in find_sites(program)[0]:
        if site.kind not in ("linear", "convolution") or site.groups > 1:
            continue
        axis = 0 if site.transposed else 1
        term = families.axis_map.terms(program.tensor_nodes[site.weight])[axis]
        if isinstance(term, Atom) and site.shape[axis] % span == 0:
            by_atom.setdefault(term.number, []).append(site)
    for family in families.prunable:
        if family.frozen or family.atom.number not in by_atom:
            continue
        yield family, by_atom[family.atom.number]


def _energy(program: Program, site: Site) -> Tensor:
    """Squares of a layer's weights, (outs x kernel, channels), over their sum."""
    weight = program.tensor(site.weight).detach()
    matrix = site.matrices(weight)[0]
    if site.kind == "convolution":
        matrix = matrix.view(site.outs, site.shape[1], -1).transpose(1, 2).flatten(0, 1)
    energy = matrix.float().square()
    return energy / energy.sum().clamp_min(torch.finfo(torch.float32).tiny)


def permute_units(edit: Edit, families: Families, orders: dict[Family, Tensor]) -> None:
    """Put the units of families into another order, in every tensor that has them.

    Args:
        edit: An edit of the program that the families are of.
        families: All of them.
        orders: Per family (extent,) int64: which unit comes to each place.
    """
    program = edit.program
    for name, node in program.tensor_nodes.items():
        tensor = program.entries[name].tensor.detach()
        changed = False
        for axis, term in enumerate(families.axis_map.terms(node)):
            places = torch.arange(tensor.shape[axis])
            for family, order in orders.items():
                owner = unit_indices(term, family.atom.number)
                if bool((owner >= 0).any()):
                    places = places[_reordered(owner, order)]
            if torch.equal(places, torch.arange(len(places))):
                continue
            tensor, changed = tensor.index_select(axis, places.to(tensor.device)), True
            for record in (program.kept.get(name, {}),):
                if axis in record:
                    record[axis] = record[axis][places]
        if changed:
            edit.set_tensor(name, tensor)


def _reordered(owner: Tensor, order: Tensor) -> Tensor:
    """Where each index of an axis comes from, by the unit that owns it."""
    mine = (owner >= 0).nonzero().flatten()
    # Indices of one unit after another, each unit's in order.
    by_unit = mine[owner[mine].argsort(stable=True)].view(len(order), -1)
    result = torch.arange(len(owner))
    result[by_unit.flatten()] = by_unit[order].flatten()
    return result
