"""Where a program has matrices that may be split, and why others may not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from torchlathe.ir import InputError, OptionError, Program, TensorKind, module_path
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.analysis.families import Families

__all__ = [
    "Kind",
    "Site",
    "bias_of",
    "chosen_sites",
    "find_sites",
    "refuse_not_finite",
    "same_input",
]

Kind = Literal["linear", "embedding", "convolution", "experts"]

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
)
# Products of segments of rows with one matrix of many each; the name that export gives them.
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
_DEQUANTISES = "torchlathe::dequantize"
_TRANSPOSED = (aten.mm.default, aten.matmul.default, aten.addmm.default)


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter that is a matrix (one for each group), and all calls that read it.

    Attributes:
        weight: Name of the parameter.
        kind: What reads it; ``"embedding"`` also where linear layers read the same parameter;
            ``"experts"`` are the matrices of a mixture of experts, one behind the other.
        calls: The calls.
        shape: Of the parameter.
        groups: Of a convolution, or the number of experts; else 1.
        transposed: Whether a matrix is (ins, outs).
    """

    weight: str
    kind: Kind
    calls: tuple[fx.Node, ...]
    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def outs(self) -> int:
        """Rows of the matrix of one group."""
        if self.kind == "experts":
            return self.shape[2] if self.transposed else self.shape[1]
        return self.shape[1] if self.transposed else self.shape[0] // self.groups

    @property
    def ins(self) -> int:
        """Columns of the matrix of one group: channels times kernel for a convolution."""
        return self.parameters // (self.outs * self.groups)

    @property
    def parameters(self) -> int:
        """Elements of the parameter."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def kernel(self) -> tuple[int, ...]:
        """Extents of a convolution's kernel; empty for others."""
        return self.shape[2:] if self.kind == "convolution" else ()

    @property
    def channels(self) -> int:
        """Columns of the matrix at one position of the kernel."""
        return self.shape[1] if self.kind == "convolution" else self.ins

    def channels_last(self, device: torch.device) -> torch.Tensor:
        """The columns of a matrix, (ins,) int64, with the channels of each position in a row."""
        columns = torch.arange(self.ins, device=device)
        return columns.view(self.channels, -1).t().reshape(-1)

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter as (groups, outs, ins)."""
        if self.transposed:
            return weight.transpose(1, 2) if self.kind == "experts" else weight.T[None]
        return weight.reshape(self.groups, self.outs, self.ins)

    def weight_from(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrices`."""
        if self.transposed:
            return matrices.transpose(1, 2) if self.kind == "experts" else matrices[0].T
        return matrices.reshape(self.shape)

    @property
    def biased(self) -> bool:
        """Whether every call adds a bias that is a tensor of the model."""
        found = [bias_of(call) for call in self.calls]
        return all(bias is not None and info(bias).tensor is not None for bias in found)

    def operand(self, call: fx.Node) -> fx.Node:
        """What a call multiplies the parameter with (or looks up)."""
        place = 1 if call.target in (aten.addmm.default, aten.embedding.default) else 0
        node: Any = call.args[place]
        assert isinstance(node, fx.Node)
        return node


def bias_of(call: fx.Node) -> fx.Node | None:
    """What a call of a site adds to each row."""
    place = call.target is aten.addmm.default
    bias: Any = call.args[0] if place else argument(call, "bias")
    return bias if isinstance(bias, fx.Node) else None


def find_sites(program: Program) -> tuple[list[Site], dict[str, str]]:
    """Every parameter that may be split, in order of execution, and why the others may not.

    Returns:
        The sites, and a reason for each parameter of two or more axes that is none.
    """
    found: list[Site] = []
    reasons: dict[str, str] = {}
    order = {node: i for i, node in enumerate(program.nodes)}
    for name, node in program.tensor_nodes.items():
        entry = program.entries[name]
        if entry.kind is not TensorKind.PARAMETER or entry.tensor.dim() < 2:
            continue
        site = _site(program, name, sorted(node.users, key=order.__getitem__), node)
        if isinstance(site, str):
            reasons[name] = site
        else:
            found.append(site)
    return sorted(found, key=lambda site: order[site.calls[0]]), reasons


def _site(program: Program, name: str, users: Sequence[fx.Node], node: fx.Node) -> Site | str:
    tensor = program.entries[name].tensor
    if not tensor.is_floating_point():
        return f"it is {str(tensor.dtype).removeprefix('torch.')}"
    if name in program.frozen:
        return "a constant was computed from it before"
    if any(_gives_stored(call) for call in users):
        return "it belongs to stored numbers, whose rows are looked up with it"
    calls = tuple(users)
    shape = tuple(int(extent) for extent in tensor.shape)
    if len(shape) == 3 and (experts := _expert_calls(node)) is not None:
        calls, transposed = experts
        return Site(name, "experts", calls, shape, shape[0], transposed)
    kinds = {_kind(call, node) for call in calls}
    if not kinds <= {"linear", "transposed", "embedding", "convolution"}:
        other = next(call for call in calls if _kind(call, node) not in ("linear", "embedding"))
        return f"%{other.name} ({other.target}) reads it in another way than as a matrix"
    if len(kinds) > 1 and kinds != {"linear", "embedding"}:
        return f"it is read in different ways: {', '.join(sorted(kinds))}"
    if kinds == {"convolution"}:
        groups = {int(argument(call, "groups", 1)) for call in calls}
        if len(groups) > 1:
            return "convolutions with different groups share it"
        return Site(name, "convolution", calls, shape, groups.pop())
    if len(shape) != 2:
        return f"it has {len(shape)} axes"
    if "embedding" in kinds:
        return Site(name, "embedding", calls, shape)
    return Site(name, "linear", calls, shape, transposed="transposed" in kinds)


def _gives_stored(call: fx.Node) -> bool:
    """Whether a look-up gives scales or zero points of numbers to the op that reads them."""
    if call.target is not aten.embedding.default:
        return False
    schemas = (getattr(user.target, "_schema", None) for user in call.users)
    return any(getattr(schema, "name", "") == _DEQUANTISES for schema in schemas)


def _expert_calls(weight: fx.Node) -> tuple[tuple[fx.Node, ...], bool] | None:
    """The grouped products with a parameter of three axes, if nothing else reads it.

    Returns:
        The calls, and whether the parameter is (experts, ins, outs); else it is (experts, outs,
        ins), and the calls see it through a transpose.
    """
    users = list(weight.users)
    if users and all(_is_grouped(user, weight) for user in users):
        return tuple(users), True
    found = []
    for view in users:
        flips = view.target is aten.transpose.int and set(view.args[1:]) in ({-2, -1}, {1, 2})
        if not flips or not all(_is_grouped(call, view) for call in view.users):
            return None
        found += list(view.users)
    return (tuple(found), False) if found else None


def _is_grouped(call: fx.Node, weight: fx.Node) -> bool:
    schema = getattr(call.target, "_schema", None)
    plain = getattr(schema, "name", "") in _GROUPED and call.all_input_nodes.count(weight) == 1
    return plain and len(call.args) >= 2 and call.args[1] is weight and bias_of(call) is None


def _kind(call: fx.Node, weight: fx.Node) -> str:
    """How a call reads a parameter; empty if not as a matrix."""
    places = [i for i, used in enumerate(call.args) if used is weight]
    if list(call.all_input_nodes).count(weight) != 1 or len(places) != 1:
        return ""
    if call.target is aten.linear.default and places == [1]:
        return "linear"
    if call.target is aten.embedding.default and places == [0]:
        return "embedding"
    if call.target in CONVOLUTIONS and places == [1]:
        return "convolution"
    if call.target in _TRANSPOSED and places == [len(call.args) - 1]:
        plain = not any(factor != 1 for factor in call.kwargs.values())
        if call.target is aten.addmm.default:
            bias = bias_of(call)
            plain = plain and bias is not None and bias.meta["val"].dim() == 1
        data: Any = call.args[places[0] - 1]
        if plain and isinstance(data, fx.Node) and data.meta["val"].dim() >= 2:
            return "transposed"
    return ""


def chosen_sites(
    sites: Sequence[Site],
    reasons: Mapping[str, str],
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    embeddings: bool,
    where: str,
    families: Callable[[], Families] | None = None,
) -> tuple[list[Site], dict[str, str]]:
    """Those that the patterns name, and reasons for the others that they name.

    Args:
        sites: All that there are.
        reasons: Of other parameters, why they are none.
        include: Patterns of parameters, modules or families; none for all.
        exclude: Likewise.
        embeddings: Whether those are among them that no pattern names.
        where: Whose patterns they are.
        families: Of the program, asked for where a pattern has a colon, as names of families do:
            it names the layers that write or read them.

    Raises:
        OptionError: A pattern matches nothing.
    """
    names = {site: set(_names(site)) for site in sites}
    if families is not None and any(":" in pattern for pattern in (*include, *exclude)):
        for family in families():
            axes = {family.name, *(f"{part.name}:{part.axis}" for part in family.slices)}
            owned = {part.name for part in family.slices}
            for site in sites:
                names[site] |= axes if site.weight in owned else set()
    plain = {name: {name} for name in reasons}
    for pattern in (*include, *exclude):
        every: Iterable[set[str]] = (*names.values(), *plain.values())
        if not any(fnmatch.filter(found, pattern) for found in every):
            known = ", ".join(site.weight for site in sites[:4])
            raise OptionError(
                f"the pattern {pattern!r} matches no layer that has a matrix"
                + (", and no family of one" if ":" in pattern and families is not None else ""),
                where=where,
                hint=f"parameters are {known}, ..." if known else "there is none",
            )

    def wanted(found: set[str]) -> bool:
        named = not include or any(fnmatch.filter(found, p) for p in include)
        return named and not any(fnmatch.filter(found, p) for p in exclude)

    left = {name: reason for name, reason in reasons.items() if wanted(plain[name])}
    chosen = []
    for site in sites:
        if not wanted(names[site]):
            continue
        if site.kind == "embedding" and not embeddings and not include:
            left[site.weight] = "it is an embedding; embeddings=true splits these too"
        else:
            chosen.append(site)
    return chosen, left


def _names(site: Site) -> Iterator[str]:
    """What a pattern may match: the parameter, and the modules that its calls are in."""
    yield site.weight
    for path in {module_path(call) for call in site.calls}:
        parts = path.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def same_input(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Groups of two or more linear layers that read the very same value, each once."""
    by_input: dict[fx.Node, list[Site]] = {}
    for site in sites:
        if site.kind == "linear" and len(site.calls) == 1:
            by_input.setdefault(site.operand(site.calls[0]), []).append(site)
    return [
        tuple(group)
        for data, group in by_input.items()
        if len(group) > 1 and info(data).tensor is None
    ]


def refuse_not_finite(program: Program, sites: Iterable[Site]) -> None:
    """Refuse weights that no sum could be made of.

    Raises:
        InputError: One of them holds NaN or infinity.
    """
    for site in sites:
        weight = program.tensor(site.weight).detach()
        # Both are NaN if anything is; a mask of a large table would take as much as its numbers.
        ends = weight.aminmax() if weight.numel() else ()
        if not all(bool(torch.isfinite(end)) for end in ends):
            raise InputError(
                f"{site.weight} has values that are not finite",
                where=site.weight,
                hint="load a checkpoint from before the training diverged, or exclude the layer",
            )
