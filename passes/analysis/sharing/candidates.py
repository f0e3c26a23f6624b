"""Layers that could share a parameter: contractions with weights of one shape and role.

The *role* of a weight is its name with every number replaced by a star, so that
``layer.3.query.weight`` and ``layer.4.query.weight`` are of one role.

Source: own.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from torchlathe.ir import OptionError, Program, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.statistics import Reader, readers_of

__all__ = [
    "Across",
    "Candidate",
    "LayerType",
    "bias_argument",
    "find_candidates",
    "fused_types",
    "layer_types",
    "role_of",
]

aten = torch.ops.aten
_PRODUCTS = (aten.addmm.default, aten.mm.default, aten.matmul.default)

Across = Literal["role", "shape", "inputs"]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One weight that could be shared.

    Attributes:
        name: Of the weight.
        role: Its name, with stars for numbers.
        kind: The op that reads it.
        shape: Of the weight.
        outs: Rows of its matrix.
        features: Columns of its matrix: what is summed over.
        readers: The calls that read it; more than one where it is tied already.
        bias: Name of the bias that all of these calls add; None if there is none, or several.
    """

    name: str
    role: str
    kind: str
    shape: tuple[int, ...]
    outs: int
    features: int
    readers: tuple[Reader, ...]
    bias: str | None = None

    @property
    def splits(self) -> bool:
        """Whether it can be written as a product: a linear layer or a plain convolution."""
        return all(_splits(reader) for reader in self.readers)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as (outs, features) float64."""
        return self.readers[0].layer_matrix(tensor.detach())[0].double()

    def tensor(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `matrix`, in the dtype of another tensor."""
        found = self.readers[0].weight_from_layer(matrix[None], self.shape)
        return found.to(like.dtype).contiguous()


@dataclass(frozen=True, eq=False)
class LayerType:
    """Layers among which classes are looked for.

    Attributes:
        name: The role, or what else they have in common.
        members: In order of execution; layers in one tuple read one value, and stay together.
    """

    name: str
    members: tuple[tuple[Candidate, ...], ...]

    @property
    def layers(self) -> tuple[Candidate, ...]:
        """All layers."""
        return tuple(layer for member in self.members for layer in member)

    def __len__(self) -> int:
        return len(self.members)


def role_of(name: str) -> str:
    """A tensor's name with every number replaced by a star."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def find_candidates(program: Program) -> tuple[Candidate, ...]:
    """All weights that only contractions read, in order of execution.

    Left out are weights in groups (grouped convolutions, batched experts), those that other ops
    read too (tied embeddings), those that are not floating, and those from which a constant was
    computed.
    """
    by_weight: dict[str, list[Reader]] = {}
    for reader in readers_of(program).values():
        by_weight.setdefault(reader.weight, []).append(reader)
    nodes = program.tensor_nodes
    found = []
    for name, readers in by_weight.items():
        tensor = program.tensor(name)
        others = set(nodes[name].users) - {reader.node for reader in readers}
        grouped = any(_groups(reader) for reader in readers)
        if others or grouped or name in program.frozen or not tensor.is_floating_point():
            continue
        _, outs, features = readers[0].layer_matrix(tensor.detach().to("meta")).shape
        kind = str(readers[0].node.target)
        shape = tuple(tensor.shape)
        bias = _common_bias(program, readers)
        found.append(
            Candidate(name, role_of(name), kind, shape, outs, features, tuple(readers), bias)
        )
    return tuple(found)


def bias_argument(node: fx.Node) -> Any:
    """What a linear op or a convolution adds to its result; None for nothing."""
    if node.target is aten.addmm.default:
        return node.args[0]
    if node.target in (aten.mm.default, aten.matmul.default):
        return None
    return argument(node, "bias")


def _common_bias(program: Program, readers: Sequence[Reader]) -> str | None:
    """A parameter, one number per out, that these calls add and nothing else reads."""
    biases = [bias_argument(reader.node) for reader in readers]
    if not all(isinstance(bias, fx.Node) and bias is biases[0] for bias in biases):
        return None
    name = info(biases[0]).tensor
    if name is None or program.entries[name].kind is not TensorKind.PARAMETER:
        return None
    calls = {reader.node for reader in readers}
    alone = set(biases[0].users) <= calls and program.tensor(name).dim() == 1
    return name if alone and name not in program.frozen else None


def layer_types(
    candidates: Sequence[Candidate],
    across: Across = "role",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    where: str = "",
) -> tuple[LayerType, ...]:
    """Candidates that may share with each other, types of one layer included.

    Args:
        candidates: As `find_candidates` gives them.
        across: What layers need to have in common: shape and role, shape alone, or just the
            number of features (for a shared basis).
        include: Patterns of weights or roles; only these.
        exclude: Patterns of weights or roles; none of these.
        where: The pass, for messages.

    Raises:
        OptionError: A pattern that matches nothing.
    """
    for pattern in (*include, *exclude):
        if not any(_matches(layer, [pattern]) for layer in candidates):
            known = ", ".join(dict.fromkeys(layer.role for layer in candidates))
            raise OptionError(
                f"the pattern {pattern!r} matches no weight that could be shared",
                where=where or None,
                hint=f"there are {known}" if known else "the model has none",
            )
    found: dict[tuple[object, ...], list[Candidate]] = {}
    for layer in candidates:
        if (include and not _matches(layer, include)) or _matches(layer, exclude):
            continue
        key: tuple[object, ...] = (layer.kind, layer.shape)
        if across == "role":
            key = (*key, layer.role)
        elif across == "inputs":
            key = (layer.kind, layer.features)
        found.setdefault(key, []).append(layer)
    names = [_type_name(layers, across) for layers in found.values()]
    # After structured-erase one role comes in several shapes, and each is a type of its own.
    names = [
        f"{name} {' x '.join(map(str, layers[0].shape))}" if names.count(name) > 1 else name
        for name, layers in zip(names, found.values(), strict=True)
    ]
    if len(set(names)) < len(names):  # nor may two ops of one shape be taken for each other
        names = [f"{name} ({number})" for number, name in enumerate(names)]
    return tuple(
        LayerType(name, tuple((layer,) for layer in layers))
        for name, layers in zip(names, found.values(), strict=True)
    )


def fused_types(types: Sequence[LayerType]) -> tuple[LayerType, ...]:
    """Types whose layers read the same values as one: queries, keys and values of attention.

    Args:
        types: Of single layers.
    """
    found: dict[tuple[object, ...], list[LayerType]] = {}
    for part in types:
        first = part.layers[0]
        reads = tuple((r.operand, r.data_axes) for m in part.members for r in m[0].readers)
        key = (len(part), first.kind, first.features, reads)
        found.setdefault(key, []).append(part)
    fused = []
    for parts in found.values():
        together = zip(*(part.members for part in parts), strict=True)
        members = tuple(tuple(layer for one in each for layer in one) for each in together)
        fused.append(LayerType(" + ".join(part.name for part in parts), members))
    return tuple(fused)


def _matches(layer: Candidate, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (layer.name, layer.role)
    )


def _type_name(layers: Sequence[Candidate], across: Across) -> str:
    first = layers[0]
    if across == "role":
        return first.role
    op = first.kind.removeprefix("aten.").removesuffix(".default")
    if across == "inputs":
        return f"{op} of {first.features}"
    return f"{op} {' x '.join(map(str, first.shape))}"


def _groups(reader: Reader) -> bool:
    return any(reader.letters.get(letter, -1) != 1 for letter in reader.groups)


def _splits(reader: Reader) -> bool:
    target = reader.node.target
    if target in _PRODUCTS:
        args, kwargs = reader.node.args, reader.node.kwargs
        scaled = any(factor != 1 for factor in kwargs.values())
        bias = args[0] if target is aten.addmm.default else None
        flat = not isinstance(bias, fx.Node) or bias.meta["val"].dim() == 1
        # The data comes first, and its last axis is the one that is summed over.
        first = reader.operand is args[1 if target is aten.addmm.default else 0]
        plain = len(reader.weight_axes) == 2 and reader.data_axes[-1] == reader.read
        return first and flat and plain and not scaled
    return target in (aten.linear.default, aten.conv1d.default, aten.conv2d.default)
