"""Small trainable layers beside frozen ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from torchlathe.ir import Edit, Program, TensorKind
from torchlathe.ir.errors import OptionError
from torchlathe.passes.base import Diagnostic, Exactness, PassContext, PassResult, RewritePass
from torchlathe.passes.rewrite.factorising.sites import Site, chosen_sites, find_sites
from torchlathe.passes.rewrite.factorising.telling import left_alone, listed
from torchlathe.passes.rewrite.factorising.writing import add_factor, stem_of
from torchlathe.passes.rewrite.tensor_networks.adapters import (
    AdapterSize,
    KroneckerLayer,
    kronecker_layer,
    mixing,
)

__all__ = ["InsertAdapters"]

aten = torch.ops.aten

_ACTIVATIONS = {
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "relu": aten.relu.default,
}
# Between a layer and the sum with what went around it.
_PASSING = (
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
)
_SUMS = (aten.add.Tensor, aten.add_.Tensor)
_NORMS = ("layer_norm", "rms_norm", "batch_norm", "group_norm", "native_layer_norm")


@dataclass(frozen=True)
class InsertAdapters(RewritePass):
    """Adds to the output of linear layers a small network of it, and lets only that train.

    Each adapter is ``x + up(act(down(x)))``, whose matrices are sums of Kronecker products with
    first factors that all adapters share. ``up`` starts at zero, so that the program computes what
    it did. All other parameters are frozen but, if asked for, those of normalisations.

    Keeps: the function. Changes: new parameters, and which ones train.

    Source: Compacter (arXiv 2106.04647).
    """

    name: ClassVar[str] = "insert-adapters"
    exactness: ClassVar[Exactness] = Exactness.EXACT

    reduction: int = field(
        default=32, metadata={"help": "width of the layer over that inside of the adapter"}
    )
    terms: int = field(
        default=4,
        metadata={"help": "Kronecker products in each matrix; the widths are multiples of it"},
    )
    rank: int = field(default=1, metadata={"help": "rank of their second factors"})
    activation: Literal["gelu", "silu", "relu"] = field(
        default="gelu", metadata={"help": "between the two layers"}
    )
    freeze: bool = field(default=True, metadata={"help": "let the adapters alone train"})
    norms: bool = field(
        default=True, metadata={"help": "let the parameters of normalisations train too"}
    )
    include: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "patterns of layers to add to; by default those whose output is added to what "
            "goes around them"
        },
    )
    exclude: tuple[str, ...] = field(
        default=(), metadata={"help": "leave these alone: patterns of tensors or modules"}
    )

    def __post_init__(self) -> None:
        """Refuse impossible options.

        Raises:
            OptionError: A number is below 1.
        """
        super().__post_init__()
        for name in ("reduction", "terms", "rank"):
            if (value := getattr(self, name)) < 1:
                raise OptionError(f"{name} is {value}, but must be at least 1", where=self.name)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Insert the adapters, and freeze the rest."""
        sites, left = chosen_sites(
            *find_sites(program), self.include, self.exclude, embeddings=False, where=self.name
        )
        chosen: list[tuple[Site, AdapterSize]] = []
        for site in sites:
            found = self._size(site)
            if isinstance(found, str):
                left[site.weight] = found
            else:
                chosen.append((site, found))
        diagnostics = list(left_alone(left)) if self.include or not chosen else []
        if not chosen:
            nothing = Diagnostic("warning", "there is no layer to add an adapter to")
            return PassResult(False, {"adapters": 0}, [nothing, *diagnostics])
        before = program.cost().parameters
        with program.edit(by=ctx.spec) as edit:
            if self.freeze:
                _freeze(program, set(_normalising(program)) if self.norms else set())
            self._insert(edit, chosen, ctx)
        added = program.cost().parameters - before
        parameters = program.parameters
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        names = listed([site.weight for site, _ in chosen])
        diagnostics.append(Diagnostic("note", f"adapters beside {names}"))
        statistics: dict[str, int | float | str] = {
            "adapters": sum(len(site.calls) for site, _ in chosen),
            "added_parameters": added,
            "trainable_parameters": trained,
            "trainable_share": trained / max(before, 1),
        }
        return PassResult(True, statistics, diagnostics)

    def _size(self, site: Site) -> AdapterSize | str:
        """Extents of the adapter of a layer, or why it has none."""
        if site.kind != "linear":
            return "it is no linear layer"
        if not self.include and not all(_is_added(call) for call in site.calls):
            return "its output is not added to anything"
        inner = max(self.terms, site.outs // self.reduction)
        inner -= inner % self.terms
        if site.outs % self.terms:
            return f"its {site.outs} outputs are no multiple of terms={self.terms}"
        return AdapterSize(site.outs, inner, self.terms, self.rank)

    def _insert(
        self, edit: Edit, chosen: Sequence[tuple[Site, AdapterSize]], ctx: PassContext
    ) -> None:
        generator = torch.Generator().manual_seed(ctx.seed)
        shared = add_factor(edit, "adapters.mixing", mixing(self.terms, generator), True)
        for site, size in chosen:
            ctx.report(f"adapter of {site.weight}")
            stem = f"{stem_of(site.weight)}adapter."
            pairs = (("down", size.width, size.inner), ("up", size.inner, size.width))
            layers = []
            for part, ins, outs in pairs:
                made = kronecker_layer(
                    ins, outs, size.terms, size.rank, generator, zero=part == "up"
                )
                layers.append(_add_layer(edit, f"{stem}{part}", made, site))
            for call in site.calls:
                self._beside(edit, call, shared, layers)

    def _beside(
        self, edit: Edit, call: fx.Node, shared: fx.Node, layers: Sequence[Sequence[fx.Node]]
    ) -> None:
        users = list(call.users)
        after = call.next

        def op(target: Any, *args: Any) -> fx.Node:
            return edit.call(target, args, like=call, before=after)

        x = call
        for number, (left, right, bias) in enumerate(layers):
            small = op(aten.matmul.default, left, right)
            # As linear takes it: (outs, ins).
            whole = op(aten.einsum.default, "iab,icd->bdac", [shared, small])
            whole = op(aten.flatten.using_ints, whole, 0, 1)
            whole = op(aten.flatten.using_ints, whole, 1, 2)
            x = op(aten.linear.default, x, whole, bias)
            if number == 0:
                x = op(_ACTIVATIONS[self.activation], x)
        edit.replace(call, op(aten.add.Tensor, call, x), users)


def _add_layer(edit: Edit, stem: str, layer: KroneckerLayer, site: Site) -> list[fx.Node]:
    like = edit.program.tensor(site.weight)
    nodes = []
    for part in ("left", "right", "bias"):
        value = getattr(layer, part).to(like.device, like.dtype)
        name = f"{stem}.{part}"
        nodes.append(edit.add_tensor(name, torch.nn.Parameter(value), TensorKind.PARAMETER))
        edit.program.rewritten |= {name}
    return nodes


def _is_added(call: fx.Node) -> bool:
    """Whether a result meets, in a sum, something of its shape that it was not made of alone."""
    node = call
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in _SUMS:
            first, second = user.args[:2]
            other = second if first is node else first
            if not isinstance(other, fx.Node):
                return False
            return bool(other.meta["val"].shape == call.meta["val"].shape)
        if user.target not in _PASSING:
            return False
        node = user
    return False


def _normalising(program: Program) -> Iterator[str]:
    """Parameters that scale and shift: those of one axis that a normalisation or product reads."""
    for name, node in program.tensor_nodes.items():
        if program.entries[name].tensor.dim() != 1:
            continue
        for user in node.users:
            target = str(user.target)
            scales = target.startswith("aten.mul.") and name.endswith("weight")
            if scales or any(norm in target for norm in _NORMS):
                yield name
                break


def _freeze(program: Program, but: set[str]) -> None:
    for name, entry in list(program.entries.items()):
        tensor = entry.tensor
        if entry.kind is not TensorKind.PARAMETER or name in but or not tensor.requires_grad:
            continue
        # A parameter of its own: the one of the user's model keeps its flag.
        frozen = torch.nn.Parameter(tensor.detach(), requires_grad=False)
        program.entries[name] = replace(entry, tensor=frozen)
