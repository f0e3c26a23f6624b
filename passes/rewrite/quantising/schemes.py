"""What a scheme asks for: the format of weights, their groups, and that of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from torchlathe.ir import OptionError
from torchlathe.kernels.dequantize.formats import Format, format_of
from torchlathe.passes.rewrite.quantising.layouts import Layout

__all__ = ["SCHEMES", "Scheme", "scheme_of"]


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored and fed.

    Attributes:
        weights: Name of the format of the weights.
        activations: Format of the layer's input, a scale for each token; None to leave it.
        group: Columns that share a scale; 0 for a whole row.
        symmetric: Whether the numbers have no zero point.
    """

    weights: str
    activations: str | None = None
    group: int = 0
    symmetric: bool = True

    @property
    def format(self) -> Format:
        """The format of the weights."""
        return format_of(self.weights)

    def layout(self, columns: int, dtype: torch.dtype) -> Layout:
        """What is stored of a matrix of so many columns and this type."""
        return Layout.of(
            self.weights, columns, group=self.group, symmetric=self.symmetric, dtype=dtype
        )


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        "w8a8": Scheme("int8", "int8"),
        "w8a16": Scheme("int8"),
        "w4a16": Scheme("int4", group=128),
        "w4a8": Scheme("int4", "int8", group=128),
        "w2a16": Scheme("int2", group=32, symmetric=False),
        "fp8": Scheme("fp8", "fp8"),
        "mxfp4": Scheme("mxfp4", group=32),
        "nvfp4": Scheme("nvfp4", group=16),
    }
)


def scheme_of(name: str, group: int | None, symmetric: bool | None, where: str) -> Scheme:
    """A scheme with what options change of it.

    Args:
        name: One of `SCHEMES`.
        group: Columns that share a scale; None for the scheme's own, 0 for a whole row.
        symmetric: None for the scheme's own.
        where: Name of the pass, for messages.

    Raises:
        OptionError: The scheme's format has no such groups, or no zero point.
    """
    scheme = SCHEMES[name]
    form = scheme.format
    if group is not None:
        if form.block is not None and group != form.block:
            raise OptionError(
                f"group is {group}, but {name} has blocks of {form.block}",
                where=where,
                hint="leave group out",
            )
        if group and (group < 16 or group % 16):
            raise OptionError(
                f"group is {group}, but must be a multiple of 16, or 0 for a whole row",
                where=where,
                hint="kernels take 32, 64 and 128",
            )
        scheme = replace(scheme, group=group)
    if symmetric is not None:
        if not symmetric and not form.integer:
            raise OptionError(
                f"symmetric=false goes with integers, and {name} has floating numbers",
                where=where,
                hint="leave symmetric out",
            )
        scheme = replace(scheme, symmetric=symmetric)
    return scheme
