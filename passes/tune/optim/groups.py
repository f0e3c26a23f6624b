"""The zero-invariant groups of a live module: what belongs to each, and zeroing it in place.

A group is one unit of a family, and consists of the slices that are zero in the model from which
the unit is erased exactly (`Family.zeroed`). All work of a step is one multiplication per tensor:
a factor per index of an axis, 1 for what stays, 0 for what is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchlathe.ir import InputError, TensorKind, info
from torchlathe.ir.axes import Term
from torchlathe.passes.analysis.families import Families, Family
from torchlathe.passes.rewrite.erasing.units import unit_indices
from torchlathe.passes.tune.optim.reducing import Scratch, sums_along
from torchlathe.passes.tune.optim.shards import Shard, all_reduced, local, shard_of

__all__ = ["GroupTable", "Place", "Sums", "named_tensors"]

# A share of an axis, and a number of elements: up to the one and from the other on, single rows
# are gathered and written back sooner than the whole tensor is.
_FEW, _LARGE = 0.2, 2**14


@dataclass
class Place:
    """One axis of a tensor that groups own indices of.

    Attributes:
        name: The tensor, as the program calls it.
        tensor: The live parameter or buffer.
        axis: The axis.
        owners: Shape (indices of the axis on this process, families): the number of the group that
            owns an index, or the number of groups for none.
        shard: Which part of the tensor this process has.
    """

    name: str
    tensor: torch.Tensor
    axis: int
    owners: torch.Tensor
    shard: Shard
    start: int = 0

    @property
    def shape(self) -> list[int]:
        """The shape in which a vector over the axis multiplies the tensor."""
        return [-1 if d == self.axis else 1 for d in range(self.tensor.dim())]


@dataclass(frozen=True)
class Sums:
    """Sums over the elements x of each group and the directions d that they move in, float64.

    Attributes:
        weights: ``sum x^2``, shape (groups,).
        products: ``sum x d``; a step subtracts a multiple of d from x.
        directions: ``sum d^2``.
        sizes: Number of elements.
        moved: ``sum x (x - after)``; not the same as the products where rates differ.
        rated: ``sum rate x^2``; of what nothing trains, at the first rate.
    """

    weights: torch.Tensor
    products: torch.Tensor
    directions: torch.Tensor
    sizes: torch.Tensor
    moved: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    rated: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class _Factors:
    """The factors of all places on one device, as views of one vector."""

    owners: torch.Tensor
    flat: torch.Tensor
    views: dict[int, torch.Tensor] = field(default_factory=dict)
    # Indices of the axis whose factors may differ from 1, where they are few; None for many.
    rows: dict[int, torch.Tensor | None] = field(default_factory=dict)


class GroupTable:
    """Groups of a module, numbered through over the families.

    Args:
        families: Of a program that was captured from the model.
        chosen: Those of them whose units are groups.
        tensors: The live parameters and buffers, by the names of the program.

    Attributes:
        chosen: The families.
        starts: Number of the first group of each family.
        count: Number of groups.
        family: Shape (groups,) int64, the place of each group's family in ``chosen``.
        sizes: Shape (groups,) float64, elements of each group.
        places: Axes of tensors that groups own indices of.

    Raises:
        InputError: A tensor of the families is missing, or has another shape.
    """

    def __init__(
        self, families: Families, chosen: Iterable[Family], tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.chosen = tuple(chosen)
        extents = [family.extent for family in self.chosen]
        self.starts = [sum(extents[:i]) for i in range(len(extents))]
        self.count = sum(extents)
        self.family = torch.repeat_interleave(
            torch.arange(len(extents)), torch.tensor(extents, dtype=torch.int64)
        )
        self.sizes = torch.zeros(self.count, dtype=torch.float64)
        self.places = self._places(families, tensors)
        self._factors = self._layout()
        self._live: list[int] = []
        self._memory: dict[str, torch.Tensor] = {}

    def _places(self, families: Families, tensors: Mapping[str, torch.Tensor]) -> list[Place]:
        terms = _terms(families, self.chosen)
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for family, start in zip(self.chosen, self.starts, strict=True):
            for part in family.zeroed or family.writers:
                if part.kind is TensorKind.CONSTANT:
                    continue
                tensor = _looked_up(part.name, tensors, terms)
                own = unit_indices(terms[part.name][part.axis], family.atom.number)
                found.setdefault((part.name, part.axis), []).append(
                    torch.where(own < 0, self.count, own + start)
                )
                each = part.repeat * tensor.numel() / tensor.shape[part.axis]
                self.sizes[start : start + family.extent] += each
        places = []
        for (name, axis), owners in found.items():
            shard = shard_of(tensors[name], name)
            own = torch.stack(owners, 1)
            if shard.dim == axis:
                own = own[shard.start : shard.stop]
            places.append(Place(name, tensors[name], axis, own, shard))
        return places

    def _layout(self) -> dict[torch.device, _Factors]:
        by_device: dict[torch.device, list[int]] = {}
        for i, place in enumerate(self.places):
            by_device.setdefault(place.tensor.device, []).append(i)
        found = {}
        for device, members in by_device.items():
            widest = max(self.places[i].owners.shape[1] for i in members)
            wide = any(self.places[i].tensor.dtype == torch.float64 for i in members)
            rows, start = [], 0
            for i in members:
                own = self.places[i].owners
                rows.append(nn.functional.pad(own, (0, widest - own.shape[1]), value=self.count))
                self.places[i].start = start
                start += len(own)
            flat = torch.ones(start, dtype=torch.float64 if wide else torch.float32, device=device)
            factors = _Factors(torch.cat(rows).to(device), flat)
            for i in members:
                place = self.places[i]
                part = flat[place.start : place.start + len(place.owners)]
                factors.views[i] = part.view(place.shape)
            found[device] = factors
        return found

    # -- zeroing -----------------------------------------------------------------------------

    def watch(self, groups: torch.Tensor) -> None:
        """Only these groups have factors other than 1 from now on; shape (groups,) bool."""
        some = torch.cat([groups, torch.zeros(1, dtype=torch.bool)])
        self._live = []
        for found in self._factors.values():
            touched = some.to(found.owners.device)[found.owners].any(1)
            for i in found.views:
                place = self.places[i]
                rows = touched[place.start : place.start + len(place.owners)].nonzero().flatten()
                if not len(rows):
                    continue
                self._live.append(i)
                few = len(rows) <= _FEW * len(place.owners) and place.tensor.numel() >= _LARGE
                found.rows[i] = rows if few else None

    @torch.no_grad()
    def multiply(self, factors: torch.Tensor) -> None:
        """Multiply what each group owns; an index of several groups by the smallest factor.

        Args:
            factors: Shape (groups,), in [0, 1]; 1 for groups that are not watched.
        """
        for device, found in self._factors.items():
            live = [i for i in self._live if i in found.views]
            if not live:
                continue
            vector = torch.cat([factors, factors.new_ones(1)]).to(device, found.flat.dtype)
            if found.owners.shape[1] == 1:
                torch.index_select(vector, 0, found.owners[:, 0], out=found.flat)
            else:
                torch.amin(vector[found.owners], 1, out=found.flat)
            many = [i for i in live if found.rows[i] is None]
            tensors = [local(self.places[i].tensor) for i in many]
            if tensors:
                torch._foreach_mul_(tensors, [found.views[i] for i in many])
            for i in live:
                if (rows := found.rows[i]) is not None:
                    _multiply_rows(self.places[i], rows, found.views[i])

    @torch.no_grad()
    def subtract(
        self,
        factors: torch.Tensor,
        values: Mapping[str, torch.Tensor],
        rates: Mapping[int, float],
    ) -> None:
        """Subtract from each group a multiple of values; of several groups' the largest.

        Args:
            factors: Shape (groups,), at least 0.
            values: By name of the tensor, as `remember` gives them.
            rates: As `sums` takes them; each multiplies the factors.
        """
        vector = torch.cat([factors, factors.new_zeros(1)])
        first = next(iter(rates.values()), 0.0)
        for place in self.places:
            each = vector[place.owners].amax(1)
            if bool(each.any()):
                tensor = local(place.tensor)
                each = each * rates.get(id(place.tensor), first)
                each = each.to(tensor.device, tensor.dtype).view(place.shape)
                tensor.sub_(each * values[place.name])

    # -- statistics --------------------------------------------------------------------------

    @torch.no_grad()
    def remember(self) -> dict[str, torch.Tensor]:
        """A copy of what this process has of each tensor that groups own slices of.

        It is in the same memory each time, until `forget`: fresh memory takes longer to get than
        to write to.
        """
        tensors = {place.name: local(place.tensor) for place in self.places}
        for name, tensor in tensors.items():
            if name not in self._memory:
                self._memory[name] = torch.empty_like(tensor)
        torch._foreach_copy_([self._memory[name] for name in tensors], list(tensors.values()))
        return self._memory

    def forget(self) -> None:
        """Give the memory of `remember` back."""
        self._memory = {}

    @torch.no_grad()
    def restore(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put remembered values back."""
        for place in self.places:
            local(place.tensor).copy_(values[place.name])

    @torch.no_grad()
    def sums(self, before: Mapping[str, torch.Tensor], rates: Mapping[int, float]) -> Sums:
        """Sums over the groups, and over all processes that share a tensor.

        Args:
            before: What `remember` gave before a step.
            rates: Learning rate of each parameter, by its id: the direction is what the step
                subtracted over it. Directions of the others, which no step moves, are zero.
        """
        found: dict[Any, torch.Tensor] = {}
        scratch = Scratch()
        first = next(iter(rates.values()), 0.0)
        for place in self.places:
            x = before[place.name]
            total = found.get(place.shard.meshes)
            if total is None:
                total = torch.zeros(5, self.count + 1, dtype=torch.float64)
                found[place.shard.meshes] = total
            rate = rates.get(id(place.tensor), 0.0)
            after = local(place.tensor) if rate else None
            values = sums_along(x, after, place.axis, scratch).to("cpu", torch.float64)
            rows = values.new_zeros(5, values.shape[1])
            rows[: len(values)] = values
            rows[4] = rates.get(id(place.tensor), first) * values[0]
            if after is not None:
                rows[3] = values[1]
                rows[1] /= rate
                rows[2] /= rate**2
            for column in place.owners.T:
                total.index_add_(1, column, rows)
        every = torch.zeros(5, self.count + 1, dtype=torch.float64)
        for meshes, total in found.items():
            every += all_reduced(total, meshes)
        weights, products, squares, moved, rated = every[:, : self.count]
        return Sums(weights, products, squares, self.sizes, moved, rated)

    # -- names -------------------------------------------------------------------------------

    def units(self, groups: torch.Tensor) -> dict[str, torch.Tensor]:
        """Units by the name of their family, of the groups that a mask of shape (groups,) has."""
        found = {}
        for family, start in zip(self.chosen, self.starts, strict=True):
            units = groups[start : start + family.extent].nonzero().flatten()
            if len(units):
                found[family.name] = units
        return found

    def zero(self) -> torch.Tensor:
        """Which groups hold nothing but zeros; shape (groups,) bool. Looks at all of them."""
        return self.sums({p.name: local(p.tensor) for p in self.places}, {}).weights == 0


def _multiply_rows(place: Place, rows: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply a few indices of the axis, and leave the memory of the others alone."""
    tensor = local(place.tensor)
    part = tensor.index_select(place.axis, rows)
    part.mul_(factors.index_select(place.axis, rows))
    tensor.index_copy_(place.axis, rows, part)


def _terms(families: Families, chosen: Iterable[Family]) -> dict[str, tuple[Term, ...]]:
    """The terms of each tensor that families own slices of, by name."""
    found = {}
    for family in chosen:
        for node in families.index.touching[family.atom.number]:
            name = info(node).tensor if node.op == "placeholder" else None
            if name is not None:
                found[name] = families.axis_map.terms(node)
    return found


def _looked_up(
    name: str, tensors: Mapping[str, torch.Tensor], terms: Mapping[str, tuple[Term, ...]]
) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None:
        raise InputError(
            f"the groups own slices of {name}, which the model does not have",
            hint="give the model that was captured; its parameters have the names of the program",
        )
    want = tuple(int(term.extent) for term in terms[name])
    if tuple(tensor.shape) != want:
        raise InputError(
            f"{name} has shape {tuple(tensor.shape)}, but {want} in the groups",
            hint="capture the model anew, as it is now",
        )
    return tensor


def named_tensors(model: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that a captured program has for them.

    Args:
        model: A module, perhaps compiled or wrapped for several processes; or tensors by name.
    """
    if isinstance(model, Mapping):
        return dict(model)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        found.setdefault(name, tensor)
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        found.setdefault(plain, tensor)
    return found
