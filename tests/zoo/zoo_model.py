"""What one entry of the zoo is, and the two ways in which its inputs are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim

__all__ = ["Inputs", "ZooModel", "images", "randomised", "sequences", "token_ids", "vectors"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class ZooModel:
    """A network with random weights and real structure, small enough for a test.

    Attributes:
        name: Id in the tests.
        make: Builds the module; weights come from the seed that `build` sets.
        inputs: ``(batch, size) -> (args, kwargs)``; size is an image's edge or a text's length.
        dynamic_shapes: As ``torch.export`` takes them.
        sizes: Two or more ``(batch, size)``; the capture is made at the first.
        slow: Not run by default.
        coverage: Share of the parameters that must be on an axis that can be erased.
        free: Axes that must be in a prunable family, as ``"fqn[axis]"``.
        pinned: Axes that must not be in a prunable family.
        approximate: Patterns of the families that may be declared approximate.
        casts: Whether the module computes in float32 in some places, whatever its dtype.
        random: Whether weights and statistics are drawn anew (not for pretrained ones).
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    dynamic_shapes: Any
    sizes: tuple[tuple[int, int], ...] = ((2, 16), (3, 16))
    slow: bool = False
    coverage: float = 0.9
    free: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    approximate: tuple[str, ...] = ()
    casts: bool = False
    random: bool = True

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The module in eval mode; equal weights for equal seeds."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            if self.random:
                randomised(model)
        return model.eval().to(dtype)

    def example(self, which: int = 0, dtype: torch.dtype = torch.float32, seed: int = 1) -> Inputs:
        """Random inputs at ``sizes[which]``; floating ones in ``dtype``."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + which)
            args, kwargs = self.inputs(*self.sizes[which])

        def convert(value: Any) -> Any:
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return tuple(map(convert, args)), {k: convert(v) for k, v in kwargs.items()}


def randomised(model: nn.Module) -> nn.Module:
    """Draw what initialisers leave at zeros and ones, where many mistakes would not show.

    Biases, norm scales and running statistics are all equal after the usual initialisation, so
    that keeping the wrong channels of them would change nothing.
    """
    with torch.no_grad():
        for tensor in map(torch.Tensor.detach, model.parameters()):
            if tensor.is_floating_point() and tensor.dim() <= 1:
                centre = 1.0 if tensor.numel() and bool((tensor == 1).all()) else 0.0
                tensor.copy_(centre + 0.3 * torch.randn_like(tensor))
            elif tensor.is_floating_point() and tensor.numel() and not bool(tensor.any()):
                tensor.copy_(0.1 * torch.randn_like(tensor))
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.copy_(0.2 * torch.randn_like(tensor))
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand_like(tensor))
    return model


def images(channels: int = 3, *, spatial: int = 2) -> dict[str, Any]:
    """Options of a model that takes ``(batch, channels, size, ...)``, with a dynamic batch."""
    return {
        "inputs": lambda batch, size: ((torch.randn(batch, channels, *[size] * spatial),), {}),
        "dynamic_shapes": ({0: Dim.DYNAMIC},),
    }


def vectors(width: int) -> dict[str, Any]:
    """Options of a model that takes ``(batch, width)``, with a dynamic batch."""
    return {
        "inputs": lambda batch, size: ((torch.randn(batch, width),), {}),
        "dynamic_shapes": ({0: Dim.DYNAMIC},),
        "sizes": ((2, 0), (5, 0)),
    }


def sequences(width: int) -> dict[str, Any]:
    """Options of a model that takes ``(batch, length, width)``, both dynamic."""
    return {
        "inputs": lambda batch, size: ((torch.randn(batch, size, width),), {}),
        "dynamic_shapes": ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),
        "sizes": ((2, 7), (3, 11)),
    }


def token_ids(vocabulary: int) -> dict[str, Any]:
    """Options of a model that takes token ids ``(batch, length)``, both dynamic."""
    return {
        "inputs": lambda batch, size: ((torch.randint(0, vocabulary, (batch, size)),), {}),
        "dynamic_shapes": ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},),
        "sizes": ((2, 7), (3, 11)),
    }
