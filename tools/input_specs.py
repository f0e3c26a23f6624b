"""Example inputs from text: ``input_ids=int64[batch=2,sequence=16]<1000,mask=int64[2,16]``.

Entries are separated by commas. Each is ``name=dtype[shape]``, a keyword, or ``dtype[shape]``, a
positional argument. A dimension with a name, ``batch=2``, becomes dynamic, and equal names mean one
extent; ``sequence=16<=512`` gives its maximum. ``<1000`` after integers draws them below 1000 (else
they are 0 or 1); integers called ``...mask...`` are ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.export import Dim

from torchlathe.ir import SpecError

__all__ = ["GivenInputs", "InputSpec", "parse_inputs", "random_inputs", "read_specs"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_ENTRY = re.compile(
    r"\s*(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<dtype>[a-z]+\d*)\s*"
    r"\[(?P<shape>[^\[\]]*)\]\s*(?:<\s*(?P<below>\d+)\s*)?(?:,|$)"
)
_DIMENSION = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)\s*=\s*)?(?P<extent>\d+)(?:\s*<=\s*(?P<most>\d+))?"
)
_EXAMPLE = '"input_ids=int64[batch=2,sequence=16]<1000" or "float32[2,3,224,224]"'


@dataclass(frozen=True)
class InputSpec:
    """One input tensor.

    Attributes:
        name: Keyword; None for a positional argument.
        dtype: Of the tensor.
        shape: Example extents.
        dynamic: Names of the axes that are dynamic.
        most: Largest extents, by the names of dynamic axes.
        below: Integers are drawn below this.
    """

    name: str | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    dynamic: Mapping[int, str] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    below: int = 2


@dataclass(frozen=True)
class GivenInputs:
    """Example inputs, and which of their dimensions are dynamic as ``torch.export`` takes it."""

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, torch.Tensor]
    dynamic_shapes: Any


def parse_inputs(text: str, *, seed: int = 0) -> GivenInputs:
    """Random inputs by their text form.

    Raises:
        SpecError: The text cannot be read.
    """
    return random_inputs(read_specs(text), seed=seed)


def read_specs(text: str) -> list[InputSpec]:
    """Read the text form of inputs.

    Raises:
        SpecError: The text cannot be read; the place is pointed at.
    """
    specs: list[InputSpec] = []
    place = 0
    while place < len(text.rstrip()):
        match = _ENTRY.match(text, place)
        if match is None:
            raise _error(text, place, "expected name=dtype[shape] or dtype[shape]")
        specs.append(_read_one(text, match))
        place = match.end()
    if not specs:
        raise SpecError("no inputs are given", hint=f"for instance {_EXAMPLE}")
    names = [spec.name for spec in specs if spec.name is not None]
    if len(set(names)) < len(names):
        raise SpecError(f"an input is named twice in {text!r}")
    if any(a.name is not None and b.name is None for a, b in pairwise(specs)):
        raise SpecError(f"a positional input stands after a named one in {text!r}")
    return specs


def random_inputs(specs: list[InputSpec], *, seed: int = 0) -> GivenInputs:
    """Tensors of these specs; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [_random(spec, generator) for spec in specs]
    args = tuple(t for t, spec in zip(tensors, specs, strict=True) if spec.name is None)
    kwargs = {spec.name: t for t, spec in zip(tensors, specs, strict=True) if spec.name is not None}
    dynamic: Any = None
    if any(spec.dynamic for spec in specs):
        most = {name: limit for spec in specs for name, limit in spec.most.items()}
        dims = {
            name: Dim(name, max=most.get(name)) for spec in specs for name in spec.dynamic.values()
        }
        shapes = [{axis: dims[n] for axis, n in s.dynamic.items()} or None for s in specs]
        # A flat tuple in the order of the call is what export takes for both kinds together.
        dynamic = tuple(shapes) if args else {s.name: d for s, d in zip(specs, shapes, strict=True)}
    return GivenInputs(args, kwargs, dynamic)


def _read_one(text: str, match: re.Match[str]) -> InputSpec:
    if match["dtype"] not in _DTYPES:
        raise _error(text, match.start("dtype"), f"known types are {', '.join(_DTYPES)}")
    shape: list[int] = []
    dynamic: dict[int, str] = {}
    most: dict[str, int] = {}
    place = match.start("shape")
    for part in match["shape"].split(",") if match["shape"].strip() else ():
        dimension = _DIMENSION.fullmatch(part.strip())
        if dimension is None:
            raise _error(text, place, "expected an extent such as 16, or a name and one, batch=2")
        extent = int(dimension["extent"])
        if name := dimension["name"]:
            if extent < 2:
                raise _error(text, place, "a dynamic dimension needs an example of 2 or more")
            dynamic[len(shape)] = name
        if dimension["most"]:
            if not name or int(dimension["most"]) < extent:
                raise _error(text, place, "a maximum is for a named dimension, and not below it")
            most[name] = int(dimension["most"])
        shape.append(extent)
        place += len(part) + 1
    below = int(match["below"]) if match["below"] else 2
    if below < 1:
        raise _error(text, match.start("below"), "the bound must be above 0")
    return InputSpec(match["name"], _DTYPES[match["dtype"]], tuple(shape), dynamic, most, below)


def _random(spec: InputSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.randn(spec.shape, generator=generator).to(spec.dtype)
    if "mask" in (spec.name or ""):
        return torch.ones(spec.shape, dtype=spec.dtype)
    return torch.randint(0, spec.below, spec.shape, generator=generator).to(spec.dtype)


def _error(text: str, place: int, message: str) -> SpecError:
    return SpecError(
        f"inputs cannot be read: {message}\n  {text}\n  {' ' * place}^",
        hint=f"for instance {_EXAMPLE}",
    )
